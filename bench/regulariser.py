"""Regularisers of parameters: importances recorded while a step trains, and a quadratic penalty in the next.

A *recorder* watches gradients and parameters and leaves one importance a parameter in the method's state. The penalty of step t
needs what was recorded while step t-1 trained, step 0 included: a step 0 without it is refused, never used silently.

Source: spec/mib-family.md section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bench.errors import UserError
from bench.lazy import torch
from bench.method import Method
from bench.recipe import Later

if TYPE_CHECKING:
    from torch import Tensor, nn

Tensors = Mapping[str, "Tensor"]


def min_max_normalised(importance: Tensor) -> Tensor:
    """Importances of one tensor scaled to [0, 1); a tensor of one element becomes 0, so is not constrained."""
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
        config: the method's hyper-parameters.
    """

    name: ClassVar[str]
    """Prefix of its keys."""
    kinds: ClassVar[tuple[str, ...]]
    """What it leaves for the next step."""

    def __init__(self, state: MutableMapping[str, Any], config: Any) -> None:
        self.state, self.config = state, config

    def key(self, kind: str, parameter: str) -> str:
        return f"{self.name}.{kind}.{parameter}"

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

    @classmethod
    def importance(cls, previous: Mapping[str, Any], normalise: bool = True) -> dict[str, Tensor]:
        """The importance of each parameter, from what the previous step left."""
        raise NotImplementedError


def named_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, detached."""
    return {name: p.detach() for name, p in network.named_parameters()}


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; zero where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}


class Regularised(Method):
    """Fine-tuning with a penalty on moving what was important before. A method names its recorder."""

    first_step = "ft"
    recorder: ClassVar[type[Recorder]]

    class Config(Method.Config):
        """Hyper-parameters of a penalty."""

        importance: Later[float] = Field(500.0, ge=0)
        """Weight of the penalty."""
        normalise: Later[bool] = True
        """Scale the importances of each tensor to [0, 1]."""

    def start_step(self) -> None:
        self.record.begin(named_parameters(self.network), self.previous)

    def setup(self) -> None:
        if not self.step.index:
            return
        left = self.recorder.importance(self.previous, self.config.normalise)
        if not left:
            raise UserError(f"the step before this one was trained without recording {self.recorder.name!r}; train it again with --force")
        assert self.teacher is not None
        self.old = named_parameters(self.teacher)
        self.importances = {name: left[name] for name in self.old}

    @property
    def record(self) -> Recorder:
        return self.recorder(self.state, self.config)

    def observe(self) -> None:
        self.record.update(gradients(self.network), named_parameters(self.network))

    def penalties(self) -> dict[str, Tensor]:
        if not self.step.index:
            return {}
        return {"penalty": self.config.importance * quadratic_penalty(dict(self.network.named_parameters()), self.old, self.importances)}

    def end_step(self) -> None:
        self.record.finish(named_parameters(self.network))
