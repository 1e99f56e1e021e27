"""The optimisation loop: one phase of one step, from its first epoch or from the last one saved."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench import distributed
from bench.data.augment import MEAN, STD
from bench.data.dataset import IGNORE
from bench.method import Method, Phase
from bench.models.network import Network, Output
from bench.seeds import mix

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(Exception):
    """Training cannot go on; the message names the cause."""


class Batch:
    """One batch on the device. Each network sees it at most once: both outputs are computed when first asked for.

    Attributes:
        images: float32 [B, 3, H, W], normalised.
        labels: int64 [B, H, W].
        extra: what else the loader yields, for example "saliency" uint8 [B, H, W].
    """

    def __init__(
        self, images: Tensor, labels: Tensor, network: Network, teacher: Network | None, extra: dict[str, Any] | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:  # fmt: skip
        self.images, self.labels, self.extra = images, labels, extra or {}
        self._network, self._teacher, self._autocast = network, teacher, autocast

    @cached_property
    def output(self) -> Output:
        """Of the network being trained."""
        with self._autocast():
            return self._network(self.images)

    @cached_property
    def teacher(self) -> Output:
        """Of the frozen network of the previous step; without a graph."""
        if self._teacher is None:
            raise TrainingError("step 0 has no teacher")
        with torch.no_grad(), self._autocast():
            return self._teacher(self.images)

    def replaced(self, images: Tensor, labels: Tensor | None = None) -> Batch:
        """Another batch of the same step: nothing computed for this one carries over."""
        labels = self.labels if labels is None else labels
        return Batch(images, labels, self._network, self._teacher, self.extra, self._autocast)


def normalise(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] with a mean and deviation of each colour, ImageNet's by default."""
    shift, scale = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return images.permute(0, 3, 1, 2).float().div(255).sub(shift).div(scale)


@dataclass
class Trainer:
    """Runs the phases of a step.

    Attributes:
        method: its hooks; `method.network` is trained.
        seed: of the run; all randomness of an epoch follows from it.
        device: where the network is.
        precision: "fp32", "bf16" or "fp16".
        on_iteration: called with (phase, epoch, iteration, loss terms, learning rate); terms are floats.
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

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision as the settings ask for it."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])

    def batch(self, raw: dict[str, Any]) -> Batch:
        """A loader's batch on the device, images normalised."""
        moved = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in raw.items()}
        images, labels = moved.pop("images"), moved.pop("labels")
        images = normalise(images).contiguous(memory_format=torch.channels_last) if images.dtype == torch.uint8 else images
        return Batch(images, labels.long(), self.method.network, self.method.teacher, moved, self.autocast)

    def new_optimiser(self, phase: Phase) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum over the phase's groups, fresh."""
        c = self.method.config
        groups = [{"weight_decay": c.weight_decay, **group} for group in phase.groups]
        for group in groups:
            group["base_lr"] = group["lr"]
        return torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, nesterov=c.momentum > 0)

    def run(self, index: int, phase: Phase, start: int = 0, optimiser_state: dict[str, Any] | None = None, total: int | None = None) -> None:
        """Train one phase.

        Args:
            index: of the phase in the step.
            phase: what to train.
            start: epochs already done.
            optimiser_state: of the checkpoint, if `start` > 0.
            total: iterations the schedule is laid out for, if not epochs times batches.

        Raises:
            TrainingError: a loss that is not finite, or an epoch without a batch.
        """
        self.optimiser = self.new_optimiser(phase)
        if optimiser_state:
            self.optimiser.load_state_dict(optimiser_state)
        for epoch in range(start, phase.epochs):
            torch.manual_seed(mix(self.seed, self.method.step.index, phase.name, epoch))
            batches = self.method.batches(epoch)
            self.epoch(phase, epoch, batches, total or len(batches) * phase.epochs, epoch * len(batches))
            self.on_epoch(index, epoch + 1)
        phase.on_end()
        self.optimiser = None

    def epoch(self, phase: Phase, epoch: int, batches: Iterable[dict[str, Any]], total: int, first: int) -> None:
        """One pass over `batches`, whose first iteration is number `first` of `total`."""
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
        self._report(phase, epoch, total, waiting)
        if iteration == first:
            raise TrainingError(f"step {self.method.step.index}: an epoch without a batch: fewer images than the batch size")

    def iteration(self, phase: Phase, raw: dict[str, Any], iteration: int, total: int) -> tuple[dict[str, Tensor], float]:
        """One update. Returns the loss terms (detached, on the device) and the first group's learning rate."""
        assert self.optimiser is not None
        method, optimiser = self.method, self.optimiser
        for group in optimiser.param_groups:
            group["lr"] = phase.rate(group["base_lr"], iteration, total)
        optimiser.zero_grad(set_to_none=True)
        with self.autocast():
            terms = phase.losses(self.batch(raw))
        self.scaler.scale(torch.stack(list(terms.values())).sum()).backward()
        self._average_gradients()  # before they are checked: a process that overflows makes all skip the update
        self.scaler.unscale_(optimiser)
        if not self.scaler.is_enabled() or self._finite_gradients():  # an overflow, whose update is skipped, is nothing to learn from
            method.observe()
        penalties = method.penalties()
        if penalties:  # equal on every process, so not averaged
            torch.stack(list(penalties.values())).sum().backward()
        self.scaler.step(optimiser)
        self.scaler.update()
        return {name: term.detach() for name, term in {**terms, **penalties}.items()}, optimiser.param_groups[0]["lr"]

    def _finite_gradients(self) -> bool:
        finite = [p.grad.isfinite().all() for p in self.method.network.parameters() if p.grad is not None]
        return not finite or bool(torch.stack(finite).all())

    def _average_gradients(self) -> None:
        """Gradients of the whole batch: the mean over the processes that train together."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        gradients = [p.grad for group in self.optimiser.param_groups for p in group["params"] if p.grad is not None]  # type: ignore[union-attr]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))

    def _report(self, phase: Phase, epoch: int, total: int, waiting: list[tuple[int, dict[str, Tensor], float, Tensor]]) -> None:
        """Read waiting losses from the device, check and pass them on."""
        if not waiting:
            return
        values = distributed.mean(torch.stack([term.float() for _, terms, *_ in waiting for term in terms.values()])).tolist()
        for iteration, terms, rate, labels in waiting:
            floats = {name: values.pop(0) for name in terms}
            for name, value in floats.items():
                if not math.isfinite(value):
                    cause = "; the batch has no labelled pixel" if (labels == IGNORE).all() else ""
                    raise TrainingError(
                        f"step {self.method.step.index}, {phase.name}, epoch {epoch}, iteration {iteration}: loss term {name!r} is {value} "
                        f"(terms {floats}, learning rate {rate:.3g}, {self.precision}{cause})"
                    )
            self.on_iteration(phase, epoch, iteration, total, floats, rate)
