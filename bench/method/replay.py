"""Exemplar memory: which images of earlier steps are kept, and how they come back. Shared by every method
that rehearses.

A memory is part of a method's state, so it belongs to one run: records of images, drawn anew at the beginning
of each later step from the records of the step before and the images of that step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.data.dataset import IGNORE
from bench.lazy import torch
from bench.method.interface import EXEMPLARS
from bench.seeds import mix

if TYPE_CHECKING:
    from torch import Tensor

    from bench.data.images import Images, Sample, Samples
    from bench.method.batch import Batch
    from bench.method.step_data import StepData

STATE = EXEMPLARS
"""Under this name a method's state holds its records."""
AUTHORS_SEED = 1
"""Of every draw in the authors' codes; here the run's seed is added, so that the run with seed 0 draws as
they do."""


class Record(NamedTuple):
    """One image in memory; as JSON a list.

    Attributes:
        name: of the image.
        labels: classes it was seen to show, ascending, without background and void.
        drawn_for: the class in whose turn it was drawn; 0 for a candidate.
    """

    name: str
    labels: Sequence[int]
    drawn_for: int = 0


def kept(state: Mapping[str, Any]) -> list[Record]:
    """The records that a method's state holds."""
    return [Record(*values) for values in state.get(STATE, [])]


# ---- drawing -----------------------------------------------------------------------------------------------


def class_balanced_draw(
    candidates: Sequence[Record], classes: Iterable[int], size: int, seed: int = AUTHORS_SEED
) -> list[Record]:
    """A memory in which the classes take turns: each takes the first candidate left that shows it, until the
    memory is full.

    Args:
        candidates: records, the last memory's first.
        classes: the classes learned so far, without background.
        size: images in the memory. It stays smaller where a whole round finds nothing more (the authors' loop
            never ends then).
        seed: of numpy's legacy generator, which shuffles first the candidates, then the classes.

    Returns:
        Records by the class they were drawn for, ascending, and then in the order of their draw; the next
        draw begins from this order.

    Source: spec/ssul.md section 9, steps 3 and 4; the same in spec/eir.md section 4.
    """
    import numpy as np

    rng = np.random.RandomState(seed)
    left, turns = list(candidates), list(classes)
    rng.shuffle(left)
    rng.shuffle(turns)
    drawn: list[Record] = []
    found = True
    while found and len(drawn) < size:
        found = False
        for c in turns:
            position = next((i for i, record in enumerate(left) if c in record.labels), None)
            if position is not None and len(drawn) < size:
                drawn.append(left.pop(position)._replace(drawn_for=c))
                found = True
    return sorted(drawn, key=lambda record: record.drawn_for)


def shown_classes(labels: Tensor, last_not_foreground: int = 0) -> list[list[int]]:
    """The classes that each label map shows, ascending, without background and void.

    Args:
        labels: int64 [B, H, W].
        last_not_foreground: label of the last channel before the first class; it is subtracted.
    """
    flat = labels.flatten(1)
    present = torch.zeros(len(flat), IGNORE + 1, dtype=torch.bool, device=labels.device).scatter_(
        1, flat, True
    )
    return [
        [c for c, shown in enumerate(row[last_not_foreground:IGNORE]) if shown and c]
        for row in present.tolist()
    ]


def look_through(
    data: StepData, images: Images, classes: Callable[[Batch], Sequence[Sequence[int] | None]]
) -> list[Record]:
    """A record of each image in list order, from one pass over all of them (a few in a smoke run).

    Args:
        data: of the step.
        images: candidates.
        classes: which classes each image of a batch shows; None for an image that is no candidate.
    """
    import torch.distributed as dist

    found: dict[int, Record] = {}
    for batch in data.stream(whole=True, images=images):
        if data.config.test_precision == "fp32":
            batch = batch.in_full_precision()
        for position, labels in zip(batch.extra["index"].tolist(), classes(batch), strict=True):
            if labels is not None:
                found[position] = Record(images.names[position], labels)
    if data.world > 1:  # each process looked at its share
        parts: list[dict[int, Record]] = [found] * data.world
        dist.all_gather_object(parts, found)
        found = {position: record for part in parts for position, record in part.items()}
    return [found[position] for position in sorted(found)]


def draw_memory(
    data: StepData,
    previous: Mapping[str, Any],
    classes: Callable[[Batch], Sequence[Sequence[int] | None]],
    size: int,
    augmentation: str | None = None,
) -> list[Record]:
    """The memory of a step, from the last memory and the previous step's images, as that step labelled them.

    Args:
        data: of the step.
        previous: state that the previous step left.
        classes: as in `look_through`.
        size: images in the memory.
        augmentation: in which candidates are seen; the training one if None.
    """
    candidates = look_through(data, data.images(data.step.index - 1, augmentation=augmentation), classes)
    return class_balanced_draw(
        [*kept(previous), *candidates], range(1, data.step.n_old), size, AUTHORS_SEED + data.seed
    )


# ---- coming back -------------------------------------------------------------------------------------------


def at_least_a_batch(names: Sequence[str], batch_size: int) -> list[str]:
    """The names, doubled until they fill a batch."""
    filled = list(names)
    while len(filled) < batch_size:
        filled *= 2
    return filled


def replace_half(
    batch: Mapping[str, Tensor], memory: Mapping[str, Tensor], order: Tensor
) -> dict[str, Tensor]:
    """The batch with the first half of the rows in `order` taken from the same rows of a memory batch.

    Args:
        batch, memory: tensors [B, …] by name; the names of `batch` must stand in `memory`.
        order: int64 [B], a permutation; of an odd number the smaller half is replaced.

    Returns:
        The same names, and "replayed", bool [B]: which rows are from memory.

    Source: spec/ssul.md section 9, "Use".
    """
    rows = order[: len(order) // 2]
    mixed = {"replayed": torch.zeros(len(order), dtype=torch.bool)}
    mixed["replayed"][rows] = True
    for name, values in batch.items():
        mixed[name] = values.clone()
        mixed[name][rows] = memory[name][rows]
    return mixed


def drawn_order(n: int, rng: torch.Generator) -> Tensor:
    """The rows of a batch of n in random order, int64 [n]: the first half is replaced."""
    return torch.randperm(n, generator=rng)


@dataclass
class HalfReplay:
    """An epoch's batches, in each of which a random half of the rows is replaced by images from memory.

    Batches have one entry more: "replayed", bool [B], the rows from memory.

    Attributes:
        data: of the step.
        exemplars: the images in memory.
        epoch: of the step.
    """

    data: StepData
    exemplars: Images
    epoch: int

    def __post_init__(self) -> None:
        self.new = self.data.loader(self.data.train, self.epoch)

    def __len__(self) -> int:
        return len(self.new)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = torch.Generator().manual_seed(mix(self.data.seed, self.data.step.index, "replay", self.epoch))
        for batch, memory in zip(self.new, self._memory_batches(), strict=False):
            yield replace_half(batch, memory, drawn_order(len(batch["images"]), rng))

    def _memory_batches(self) -> Iterator[dict[str, Tensor]]:
        """Memory batches without end: round after round through the memory, each epoch with rounds of its
        own."""
        for count in itertools.count():
            yield from self.data.loader(self.exemplars, mix(self.epoch, count), purpose="exemplars")


class WithExemplars:
    """The step's images, and behind them those of the memory, as one data set; samples say in "replayed"
    which they are.

    Args:
        new: the step's images.
        exemplars: yields samples as `Images` does.
    """

    def __init__(self, new: Images, exemplars: Samples) -> None:
        self.new, self.exemplars = new, exemplars

    def __len__(self) -> int:
        return len(self.new) + len(self.exemplars)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, seed = item
        behind = index - len(self.new)
        sample = self.new[item] if behind < 0 else self.exemplars[behind, seed]
        return {**sample, "replayed": behind >= 0}
