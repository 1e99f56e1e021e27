"""Regularisers of parameters: importances recorded while a step trains, and a quadratic penalty in the next.

A *recorder* watches gradients and parameters and leaves one importance a parameter in the method's state. The
penalty of step t needs what was recorded while step t-1 trained, step 0 included. Where step 0 is another
method's, it is trained *with records*: they are part of its key, they touch no bit of the training, and what
lacks them is never used in its place.

Source: spec/mib-family.md section 4.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bench.errors import UserError
from bench.lazy import torch
from bench.method.interface import Method
from bench.method.settings import Later

if TYPE_CHECKING:
    from torch import Tensor, nn

Tensors = Mapping[str, "Tensor"]


def min_max_normalised(importance: Tensor) -> Tensor:
    """Importances of one tensor scaled to [0, 1); a tensor of one element becomes 0, so is not
    constrained."""
    low, high = importance.min(), importance.max()
    return (importance - low) / (high - low + 1e-8)


def quadratic_penalty(parameters: Tensors, old: Tensors, importance: Tensors) -> Tensor:
    """Sum over the old network's parameters of importance * (theta - theta_old)^2, a scalar."""
    names = list(old)
    moved = torch._foreach_sub([parameters[n] for n in names], [old[n] for n in names])
    return torch.stack([(importance[n] * d.square()).sum() for n, d in zip(names, moved, strict=True)]).sum()


class Recorder:
    """Records one kind of importance in `state`, under keys `<name>.<kind>.<parameter>`.

    Args:
        state: where it keeps its tensors; saved with every checkpoint.
        settings: its own, by name: what `Method.records` says of it.
    """

    name: ClassVar[str]
    """Prefix of its keys."""
    kinds: ClassVar[tuple[str, ...]]
    """What it leaves for the next step."""
    version: ClassVar[int] = 1
    """Raised when a change of the code changes what it leaves."""

    def __init__(self, state: MutableMapping[str, Any], **settings: Any) -> None:
        self.state, self.settings = state, settings

    @classmethod
    def key(cls, kind: str, parameter: str) -> str:
        return f"{cls.name}.{kind}.{parameter}"

    def listed(self, kind: str, parameters: Tensors) -> list[Tensor]:
        """One tensor a parameter."""
        return [self.state[self.key(kind, p)] for p in parameters]

    def fill(self, kind: str, tensors: Tensors) -> None:
        for parameter, value in tensors.items():
            self.state[self.key(kind, parameter)] = value

    def drop(self, kind: str) -> None:
        for key in [key for key in self.state if key.startswith(f"{self.name}.{kind}.")]:
            del self.state[key]

    @classmethod
    def saved(cls, kind: str, previous: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the previous step left of one kind, by parameter."""
        prefix = f"{cls.name}.{kind}."
        return {key[len(prefix) :]: value for key, value in previous.items() if key.startswith(prefix)}

    def begin(self, parameters: Tensors, previous: Mapping[str, Any]) -> None:
        """A step begins: `parameters` are those of the network with its new heads."""
        raise NotImplementedError

    def update(self, gradients: Tensors, parameters: Tensors) -> None:
        """Once an iteration: the gradients of the batch's loss, before the optimiser moves the parameters."""
        raise NotImplementedError

    def finish(self, parameters: Tensors) -> None:
        """The step is over: leave only what the next step needs."""
        raise NotImplementedError


def named_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, detached."""
    return {name: p.detach() for name, p in network.named_parameters()}


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; zero where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}


class Recording(Method):
    """Any method, watched by recorders: put before its class, as a wrapper is. It changes no number of the
    training."""

    recorded_by: Sequence[Recorder] = ()
    """The recorders, in the order in which they are updated."""

    def start_step(self) -> None:
        super().start_step()
        for recorder in self.recorded_by:
            recorder.begin(named_parameters(self.network), self.previous)

    def observe(self) -> None:
        super().observe()
        if self.recorded_by:
            found, now = gradients(self.network), named_parameters(self.network)
            for recorder in self.recorded_by:
                recorder.update(found, now)

    def end_step(self) -> None:
        super().end_step()
        for recorder in self.recorded_by:
            recorder.finish(named_parameters(self.network))


def with_records(
    method: Method, places: Mapping[str, str], records: Mapping[str, Mapping[str, Any]]
) -> Method:
    """The same method, recording.

    Args:
        method: not attached to a step yet.
        places: "module:class" of each recorder.
        records: settings of each recorder by its name, in the order in which they are updated.
    """
    kind = type(method)
    recording = type(
        kind.__name__, (Recording, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__}
    )(method.config)
    recorders = []
    for name, settings in records.items():
        module, _, words = places[name].partition(":")
        recorder = getattr(importlib.import_module(module), words)
        own = {key: value for key, value in settings.items() if key != "version"}
        recorders.append(recorder(recording.state, **own))
    recording.recorded_by = recorders
    return recording


class Regularised(Recording):
    """Fine-tuning with a penalty on moving what was important before. A method names its recorders."""

    first_step = "ft"
    recorders: ClassVar[tuple[type[Recorder], ...]] = ()

    class Config(Method.Config):
        """Hyper-parameters of a penalty."""

        importance: Later[float] = Field(500.0, ge=0)
        """Weight of the penalty."""
        normalise: Later[bool] = True
        """Scale the importances of each tensor to [0, 1]."""

    @classmethod
    def recorder_settings(cls, config: Any) -> dict[str, dict[str, Any]]:
        """Settings of each recorder by its name."""
        return {recorder.name: {} for recorder in cls.recorders}

    @classmethod
    def records(cls, config: Any) -> dict[str, dict[str, Any]]:
        settings = cls.recorder_settings(config)
        return {
            recorder.name: {**settings[recorder.name], "version": recorder.version}
            for recorder in cls.recorders
        }

    @classmethod
    def importance_of(cls, previous: Mapping[str, Any], normalise: bool = True) -> dict[str, Tensor]:
        """The importance of each parameter, from what the previous step left."""
        raise NotImplementedError

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = self.recorder_settings(config)
        self.recorded_by = [recorder(self.state, **settings[recorder.name]) for recorder in self.recorders]

    def setup(self) -> None:
        super().setup()
        if not self.step.index:
            return
        left = self.importance_of(self.previous, self.config.normalise)
        if not left:
            names = " and ".join(repr(recorder.name) for recorder in self.recorders)
            raise UserError(
                f"the step before this one was trained without recording {names}; train it again with --force"
            )
        self.old = named_parameters(self.teacher)
        self.importances = {name: left[name] for name in self.old}

    def penalties(self) -> dict[str, Tensor]:
        terms = super().penalties()
        if self.step.index:
            penalty = quadratic_penalty(dict(self.network.named_parameters()), self.old, self.importances)
            terms["penalty"] = self.config.importance * penalty
        return terms
