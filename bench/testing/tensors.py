"""StepData from tensors: what a step may see, given as batches, without a file. With it any test can open a
job."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.data.dataset import IGNORE, Dataset, Split
from bench.data.index import ClassIndex
from bench.data.locate import Files
from bench.method.settings import Settings
from bench.method.step_data import StepData
from bench.protocol.protocol import Protocol

TensorBatch = Mapping[str, Tensor]
""""images" uint8 [B, S, S, 3] or normalised float [B, 3, S, S], "labels" integer [B, S, S], and what else a
loader yields."""


def tensor_dataset(n_classes: int, name: str = "tensors", background: str = "class") -> Dataset:
    """A data set of `n_classes` classes (background among them) that has no files."""
    split = Split(image="{name}.png", mask="{name}.png")
    classes = ("background", *(f"class {c}" for c in range(1, n_classes)))
    return Dataset(name=name, title=name, classes=classes, background=background, train=split, test=split)


def tensor_protocol(
    sizes: Sequence[int], name: str = "tensors", background: str = "class", setting: str = "overlapped"
) -> Protocol:
    """A protocol whose steps add `sizes` channels (background is in the first), in ascending class order."""
    groups, first = [], 1
    for n in (sizes[0] - 1, *sizes[1:]):
        groups.append(tuple(range(first, first + n)))
        first += n
    return Protocol(name, tensor_dataset(first, name, background), setting, tuple(groups))


class GivenBatches:
    """Some batches in the place of a loader."""

    def __init__(self, batches: Sequence[TensorBatch]) -> None:
        self.batches = batches
        self.sampler = self
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            yield dict(batch)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class GivenImages:
    """Some images in the place of `Images`: their names, and the batches in which one pass meets them."""

    names: tuple[str, ...]
    batches: tuple[TensorBatch, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.names)


def in_batches(images: Tensor, size: int, **more: Tensor) -> tuple[TensorBatch, ...]:
    """Images [N, …] and what belongs to them [N, …] in batches of `size`, each with the "index" of its
    images."""
    rows = torch.arange(len(images)).split(size)
    return tuple({"images": images[i], **{k: v[i] for k, v in more.items()}, "index": i} for i in rows)


@dataclass
class TensorData(StepData):
    """StepData whose batches are given.

    Attributes:
        batches: those of the main training, epoch by epoch.
        epochs: that they are of.
        whole: those of a pass over all of the step's images once (NeST's similarity); the first epoch's if
            empty.
        candidates: images of the step before, as memories look through them.
        memory: batches of rehearsed images, epoch by epoch, where they come on their own (SSUL-M).
        test: test images uint8 [N, S, S, 3] and their labels as data set ids, integer [N, S, S], 255 void.
        shows: classes that each test image shows in its whole mask; None: those of its labels.
    """

    batches: Sequence[TensorBatch] = ()
    epochs: int = 1
    whole: Sequence[TensorBatch] = ()
    candidates: GivenImages = GivenImages(())
    memory: Sequence[TensorBatch] = ()
    test: tuple[Tensor, Tensor] = (
        torch.zeros(0, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(0, 8, 8, dtype=torch.uint8),
    )
    shows: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._epoch = 0
        self._given = GivenImages(tuple(f"i{i}" for i in range(self._per_epoch * self.config.batch_size)))

    @property
    def _per_epoch(self) -> int:
        return len(self.batches) // self.epochs

    @property
    def train(self) -> Any:
        return self._given

    def names(self, index: int) -> list[str]:
        return list(self.candidates.names if index < self.step.index else self._given.names)

    def images(
        self,
        index: int,
        names: Sequence[str] | None = None,
        augmentation: str | None = None,
        table: np.ndarray | None = None,
    ) -> Any:
        return self.candidates if index < self.step.index else GivenImages(tuple(names or self._given.names))

    def test_images(self, positions: Sequence[int] | None = None, split: str = "test") -> Any:
        images, labels = self.test
        chosen = list(range(len(images))) if positions is None else list(positions)
        names = tuple(self.index["test"].names[i] for i in chosen)
        return GivenImages(names, in_batches(images[chosen], self.config.batch_size, labels=labels[chosen]))

    def loader(
        self, images: Any, epoch: int, purpose: str = "train", shuffle: bool = True, drop_last: bool = True
    ) -> Any:
        if purpose == "exemplars":
            n = len(self.memory) // self.epochs
            return GivenBatches(self.memory[self._epoch * n : (self._epoch + 1) * n])
        self._epoch = epoch % self.epochs  # a pass after the last epoch sees the first one's
        first = self._epoch * self._per_epoch
        return GivenBatches(self.batches[first : first + self._per_epoch])

    @contextlib.contextmanager
    def once(
        self, images: Any, purpose: str, shuffle: bool = True, drop_last: bool = False, epoch: int = 0
    ) -> Iterator[Any]:
        if purpose == "train" and images is not self.candidates:
            yield self.loader(images, epoch)
        elif images is self._given:
            yield GivenBatches(self.whole or self.batches[: self._per_epoch])
        else:
            yield GivenBatches(images.batches)


def tensor_data(
    protocol: Protocol,
    index: int,
    config: Settings,
    batches: Sequence[TensorBatch],
    test: tuple[Tensor, Tensor],
    seed: int = 0,
    epochs: int | None = None,
    shows: Sequence[Sequence[int]] | None = None,
    **more: Any,
) -> TensorData:
    """What a step may see, from tensors.

    Args:
        protocol, index: the step.
        config: the settings in force at it.
        batches: of the main training, epoch by epoch.
        test: test images and their labels as data set ids.
        seed: of the run.
        epochs: that the batches are of; those of the settings if None.
        shows: classes that each test image shows in its whole mask; None: those of its labels.
        more: further attributes of TensorData.
    """
    labels = test[1].flatten(1).tolist()
    seen = (
        [set(row) - {0, IGNORE} for row in labels]
        if shows is None
        else [set(row) - {0, IGNORE} for row in shows]
    )
    presence = tuple(sum(1 << int(c) for c in row) for row in seen)
    tested = ClassIndex(tuple(f"t{i}" for i in range(len(presence))), presence, "0" * 16, "")
    trained = ClassIndex((), (), "0" * 16, "")
    files = {split: Files(protocol.dataset, split, Path(), ()) for split in ("train", "test")}
    return TensorData(
        protocol,
        protocol.step(index),
        files,
        {"train": trained, "test": tested},
        config,
        seed,
        batches=batches,
        epochs=epochs or config.epochs,
        test=test,
        shows=shows,
        **more,
    )
