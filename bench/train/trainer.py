"""The optimisation loop: one phase of one step, from its beginning or from where a checkpoint was written."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bench import distributed
from bench.data.dataset import IGNORE
from bench.data.loader import Loader
from bench.errors import TrainingError
from bench.method.batch import Batch, normalise
from bench.method.interface import Batches, Method, Phase
from bench.seeds import mix
from bench.train.stop import Stop

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

Saved = Mapping[str, Any]
"""The state dict of an optimiser."""


class Place(NamedTuple):
    """Where in a step training is: phase, epochs done in it, batches done of the next epoch."""

    phase: int = 0
    epochs: int = 0
    batches: int = 0


BEGINNING = Place()


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
        on_checkpoint: called in every process, with the place, when a checkpoint is due: after an iteration
            if `checkpoint_seconds` have passed since the last one or a signal asks the job to stop (among
            several processes: at the next exchange of losses), and at the end of a phase.
        after_iteration: called with (iterations done, of how many in this phase).
        checkpoint_seconds: see there.
        stop: signals that wait for the checkpoint.
        log_every: iterations between two reads of the losses from the device.
    """

    method: Method
    seed: int
    device: torch.device
    precision: str = "fp32"
    on_iteration: Callable[[Phase, int, int, int, dict[str, float], float], None] = lambda *_: None
    on_checkpoint: Callable[[Place], None] = lambda _: None
    after_iteration: Callable[[int, int], None] = lambda *_: None
    checkpoint_seconds: float = math.inf
    stop: Stop = field(default_factory=Stop)
    optimiser: torch.optim.Optimizer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.log_every = 1 if self.device.type == "cpu" else 10
        self._saved = time.monotonic()

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
        start: Place = BEGINNING,
        optimiser_state: Saved | None = None,
        go_on: Callable[[], None] = lambda: None,
        total: int | None = None,
    ) -> None:
        """Train one phase.

        Args:
            index: of the phase in the step.
            phase: what to train.
            start: what is already done of it.
            optimiser_state: of the checkpoint, if `start` is not the beginning.
            go_on: called before the first iteration if `start` is within an epoch: sets random generators to
                where they stood.
            total: iterations the schedule is laid out for, if not those of the phase.

        Raises:
            TrainingError: a loss that is not finite, or an epoch without a batch.
        """
        self.optimiser = self.new_optimiser(phase)
        if optimiser_state:
            self.optimiser.load_state_dict(dict(optimiser_state))
        length, place, left = phase.length, start._replace(phase=index), True
        while left and (length.iterations is not None or place.epochs < length.epochs):
            torch.manual_seed(mix(self.seed, self.method.step.index, phase.name, place.epochs))
            batches = self.method.batches(place.epochs)
            first = place.epochs * len(batches)
            of_phase = len(batches) * length.epochs if length.iterations is None else length.iterations
            if first < of_phase or not first:  # else a resumed phase was over
                self.epoch(phase, place, batches, total or of_phase, of_phase - first, go_on)
                place = Place(index, place.epochs + 1)
            left = place.epochs * len(batches) < of_phase
        phase.on_end()
        self.optimiser = None

    def epoch(
        self,
        phase: Phase,
        place: Place,
        batches: Batches,
        total: int,
        count: int | None = None,
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        """One pass over `batches`, from `place` on.

        Args:
            phase: what is trained.
            place: where training is.
            batches: of the epoch.
            total: iterations the schedule is laid out for.
            count: batches that the phase still takes, of this epoch and later ones; None: all.
            go_on: see `run`.
        """
        self.method.train_mode()
        first, size = place.epochs * len(batches), min(len(batches), count or len(batches))
        iteration, waiting = first + place.batches, []
        rest = after(batches, place.batches)
        if place.batches:
            go_on()
        self.stop.iterating = True
        try:
            for raw in itertools.islice(rest, size - place.batches):
                terms, rate = self.iteration(phase, raw, iteration, total)
                waiting.append((iteration, terms, rate, raw["labels"]))
                iteration += 1
                self.after_iteration(iteration, total)
                done = iteration - first
                report = done == size or len(waiting) == self.log_every
                due = done == count or self._due(together=report)
                if report or due:
                    self._report(phase, place.epochs, total, waiting)
                    waiting = []
                if due:
                    ended = Place(place.phase, place.epochs + 1)
                    self._checkpoint(ended if done == size else place._replace(batches=done))
        finally:
            self.stop.iterating = False
        if iteration == first:
            what = "an epoch without a batch: fewer images than the batch size"
            raise TrainingError(f"step {self.method.step.index}: {what}")

    def _due(self, together: bool) -> bool:
        """Whether a checkpoint is wanted now.

        Processes that train one step decide it `together`, where they exchange their losses anyway: if one of
        them wants it, all write down where they stand.
        """
        wanted = self.stop.asked is not None or time.monotonic() - self._saved >= self.checkpoint_seconds
        if distributed.world_size() == 1:
            return wanted
        return together and bool(distributed.summed(torch.tensor(float(wanted), device=self.device)))

    def _checkpoint(self, place: Place) -> None:
        self.on_checkpoint(place)
        self._saved = time.monotonic()
        self.stop.act()

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


def after(batches: Batches, done: int) -> Iterator[dict[str, Any]]:
    """An epoch's batches but for the first `done`; what the pass draws when it begins is drawn."""
    if isinstance(batches, Loader):
        return batches.after(done)  # the files of the others are not read
    rest = iter(batches)
    for _ in range(done):
        next(rest)
    return rest
