"""The optimisation loop: one phase of one step, from its first epoch or from the last one saved."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench import distributed
from bench.data.dataset import IGNORE
from bench.errors import TrainingError
from bench.method.batch import Batch, normalise
from bench.method.interface import Method, Phase
from bench.seeds import mix

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

Saved = Mapping[str, Any]
"""The state dict of an optimiser."""


@dataclass
class Trainer:
    """Runs the phases of a step.

    Attributes:
        method: its hooks; `method.network` is trained.
        seed: of the run; all randomness of an epoch follows from it.
        device: where the network is.
        precision: "fp32", "bf16", "fp16" or "fp64".
        on_iteration: called with (phase, epoch, iteration, iterations, loss terms, learning rate); terms are
            floats.
        on_epoch: called after each epoch with (phase index, epochs done); the place to save a checkpoint.
        after_iteration: called with (iterations done, of how many in this phase).
        log_every: iterations between two reads of the losses from the device.
    """

    method: Method
    seed: int
    device: torch.device
    precision: str = "fp32"
    on_iteration: Callable[[Phase, int, int, int, dict[str, float], float], None] = lambda *_: None
    on_epoch: Callable[[int, int], None] = lambda *_: None
    after_iteration: Callable[[int, int], None] = lambda *_: None
    optimiser: torch.optim.Optimizer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.log_every = 1 if self.device.type == "cpu" else 10

    @property
    def dtype(self) -> torch.dtype:
        """Of images and weights: float32, float64 in that precision."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision as the settings ask for it."""
        if self.precision in ("fp32", "fp64"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])

    def test_autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision of tests and validations, where the settings do not ask for fp32 there."""
        full = self.method.config.test_precision == "fp32"
        return contextlib.nullcontext() if full else self.autocast()

    def batch(self, raw: Mapping[str, Any]) -> Batch:
        """A loader's batch on the device, images normalised."""
        moved = {
            k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in raw.items()
        }
        images, labels = moved.pop("images"), moved.pop("labels")
        if images.dtype == torch.uint8:
            images = normalise(images, dtype=self.dtype).contiguous(memory_format=torch.channels_last)
        return Batch(images, labels.long(), self.method.network, self.method.teacher, moved, self.autocast)

    def new_optimiser(self, phase: Phase) -> torch.optim.Optimizer:
        """The phase's optimiser over its groups, fresh."""
        optimiser = phase.optimiser(phase.groups)
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
        return optimiser

    def run(
        self,
        index: int,
        phase: Phase,
        start: int = 0,
        optimiser_state: Saved | None = None,
        total: int | None = None,
    ) -> None:
        """Train one phase.

        Args:
            index: of the phase in the step.
            phase: what to train.
            start: epochs already done.
            optimiser_state: of the checkpoint, if `start` > 0.
            total: iterations the schedule is laid out for, if not those of the phase.

        Raises:
            TrainingError: a loss that is not finite, or an epoch without a batch.
        """
        self.optimiser = self.new_optimiser(phase)
        if optimiser_state:
            self.optimiser.load_state_dict(dict(optimiser_state))
        length, epoch, left = phase.length, start, True
        while left and (length.iterations is not None or epoch < length.epochs):
            torch.manual_seed(mix(self.seed, self.method.step.index, phase.name, epoch))
            batches = self.method.batches(epoch)
            first = epoch * len(batches)
            of_phase = len(batches) * length.epochs if length.iterations is None else length.iterations
            if first < of_phase or not first:  # else a resumed phase was over
                self.epoch(phase, epoch, batches, total or of_phase, first, of_phase - first)
                epoch += 1
                self.on_epoch(index, epoch)
            left = epoch * len(batches) < of_phase
        phase.on_end()
        self.optimiser = None

    def epoch(
        self,
        phase: Phase,
        epoch: int,
        batches: Iterable[dict[str, Any]],
        total: int,
        first: int,
        count: int | None = None,
    ) -> None:
        """One pass over `batches` (or the first `count` of them), whose first iteration is number `first` of
        `total`."""
        self.method.train_mode()
        iteration, waiting = first, []
        for raw in batches:
            terms, rate = self.iteration(phase, raw, iteration, total)
            waiting.append((iteration, terms, rate, raw["labels"]))
            iteration += 1
            self.after_iteration(iteration, total)
            if len(waiting) == self.log_every:
                self._report(phase, epoch, total, waiting)
                waiting = []
            if count is not None and iteration - first == count:
                break
        self._report(phase, epoch, total, waiting)
        if iteration == first:
            what = "an epoch without a batch: fewer images than the batch size"
            raise TrainingError(f"step {self.method.step.index}: {what}")

    def iteration(
        self, phase: Phase, raw: dict[str, Any], iteration: int, total: int
    ) -> tuple[dict[str, Tensor], float]:
        """One update. Returns the loss terms (detached, on the device) and the first group's learning
        rate."""
        assert self.optimiser is not None
        method, optimiser = self.method, self.optimiser
        for group in optimiser.param_groups:
            group["lr"] = phase.rate(group["base_lr"], iteration, total)
        optimiser.zero_grad(set_to_none=True)
        with self.autocast():
            terms = phase.losses(self.batch(raw))
        self.scaler.scale(torch.stack(list(terms.values())).sum()).backward()
        self._average_gradients()  # before they are checked: one that overflows makes all skip the update
        self.scaler.unscale_(optimiser)
        if (
            not self.scaler.is_enabled() or self._finite_gradients()
        ):  # an overflow, whose update is skipped, teaches nothing
            method.observe()
        penalties = method.penalties()
        if penalties:  # equal on every process, so not averaged
            torch.stack(list(penalties.values())).sum().backward()
        if phase.clip is not None:
            trained = [p for group in optimiser.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, phase.clip)
        self.scaler.step(optimiser)
        self.scaler.update()
        rate: float = optimiser.param_groups[0]["lr"]
        return {name: term.detach() for name, term in {**terms, **penalties}.items()}, rate

    def _finite_gradients(self) -> bool:
        finite = [p.grad.isfinite().all() for p in self.method.network.parameters() if p.grad is not None]
        return not finite or bool(torch.stack(finite).all())

    def _average_gradients(self) -> None:
        """Gradients of the whole batch: the mean over the processes that train together."""
        if not dist.is_initialized() or dist.get_world_size() == 1 or self.optimiser is None:
            return
        trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        gradients = [p.grad for p in trained if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))

    def _report(
        self,
        phase: Phase,
        epoch: int,
        total: int,
        waiting: list[tuple[int, dict[str, Tensor], float, Tensor]],
    ) -> None:
        """Read waiting losses from the device, check and pass them on."""
        if not waiting:
            return
        wide = [term.to(self.dtype) for _, terms, *_ in waiting for term in terms.values()]
        values = distributed.mean(torch.stack(wide)).tolist()
        for iteration, terms, rate, labels in waiting:
            floats = {name: values.pop(0) for name in terms}
            for name, value in floats.items():
                if not math.isfinite(value):
                    cause = "; the batch has no labelled pixel" if (labels == IGNORE).all() else ""
                    where = (
                        f"step {self.method.step.index}, {phase.name}, epoch {epoch}, iteration {iteration}"
                    )
                    about = f"terms {floats}, learning rate {rate:.3g}, {self.precision}{cause}"
                    raise TrainingError(f"{where}: loss term {name!r} is {value} ({about})")
            self.on_iteration(phase, epoch, iteration, total, floats, rate)
