"""What a step may see: its images, those of earlier steps, and the test images; and their way to the network
as batches.

A sample is drawn from (seed, step, epoch, position) alone, so batches are the same whatever the number of
workers, and an interrupted epoch is repeated exactly.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.data.dataset import IGNORE
from bench.data.images import Images, ImageStore, Samples
from bench.data.index import ClassIndex
from bench.data.loader import EpochSampler, Loader
from bench.data.locate import Files
from bench.errors import UserError
from bench.method.batch import Batch
from bench.method.settings import Settings
from bench.protocol.labels import INDEX, View, labels_by_class, lookup_table, rule, training_table
from bench.protocol.protocol import Protocol, Step
from bench.seeds import mix


@dataclass
class StepData:
    """What a step may see. Whoever opens one closes it: it owns the loaders that it hands out.

    Attributes:
        protocol, step: what is learned.
        files, index: files and class index of "train" and "test".
        config: the settings in force at this step (crop, augmentation, label_rule, batch_size).
        seed: of the run.
        rank, world: this process among those that train together.
        workers: data-loading processes.
        pin: pin memory for copies to a GPU.
        smoke: batches of an epoch in a smoke run, else None.
        maps: named maps that training samples carry beside image and labels.
        prepare: turns a loader's batch into one on the device; set by the engine.
    """

    protocol: Protocol
    step: Step
    files: Mapping[str, Files]
    index: Mapping[str, ClassIndex]
    config: Settings
    seed: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    pin: bool = False
    smoke: int | None = None
    maps: tuple[str, ...] = ()
    prepare: Callable[[dict[str, Any]], Batch] | None = None

    def __post_init__(self) -> None:
        self._stores: dict[str, ImageStore] = {}
        self._loaders: dict[tuple[int, str], Loader] = {}
        size = self.config.batch_size
        if size % self.world:
            raise UserError(
                f"batch_size = {size} is the size over all processes and does not divide by {self.world} "
                "processes"
            )

    def close(self) -> None:
        """End the loaders' processes."""
        for loader in self._loaders.values():
            loader.close()
        self._loaders.clear()

    # ---- images --------------------------------------------------------------------------------------------

    @functools.cached_property
    def train(self) -> Images:
        """Training images of this step."""
        return self.images(self.step.index)

    def store(self, split: str) -> ImageStore:
        """Decoded files of a split."""
        if split not in self._stores:
            self._stores[split] = ImageStore(self.files[split])
        return self._stores[split]

    def names(self, index: int) -> list[str]:
        """Names of the training images of a step, in list order."""
        index_of = self.index["train"]
        chosen = rule(self.config.label_rule).images("train", self.protocol, index, index_of.presence)
        return [index_of.names[i] for i in chosen]

    def images(
        self,
        index: int,
        names: Sequence[str] | None = None,
        augmentation: str | None = None,
        table: np.ndarray | None = None,
    ) -> Images:
        """Training images of step `index` as that step labels them.

        Args:
            index: the step.
            names: some images only.
            augmentation: instead of the training one, for example "center-crop".
            table: another label view, uint8 [256].
        """
        names = self.names(index) if names is None else names
        return Images(
            self.store("train"),
            names,
            training_table(self.protocol, index, self.config.label_rule) if table is None else table,
            augmentation or self.config.augmentation,
            self.config.crop,
            maps=self.maps,
            classes=self.classes(index, names),
        )

    def classes(self, index: int, names: Sequence[str]) -> np.ndarray:
        """Which of this step's channels each image shows, as step `index` labels it: bool [N, C].

        The whole image counts, not the crop; background (channel 0) is never told.
        """
        dataset, step = self.protocol.dataset, self.protocol.step(index)
        view = rule(self.config.label_rule).view("train", dataset)
        label_of = labels_by_class(view, len(dataset.classes), self.protocol.order, step)
        told = [(1 << c, label) for c, label in enumerate(label_of) if c and 0 < label < self.step.n_classes]
        shows = np.zeros((len(names), self.step.n_classes), bool)
        for row, name in enumerate(names):
            presence = self._presence[name]
            for bit, label in told:
                shows[row, label] = bool(presence & bit)
        return shows

    @functools.cached_property
    def _presence(self) -> dict[str, int]:
        index = self.index["train"]
        return dict(zip(index.names, index.presence, strict=True))

    def all_seen_table(self) -> np.ndarray:
        """The label view in which every class up to this step keeps its channel (for rehearsed images), uint8
        [256]."""
        return lookup_table(View(0, INDEX, 0, IGNORE), self.protocol.dataset, self.protocol.order, self.step)

    def test_images(self, positions: Sequence[int] | None = None, split: str = "test") -> Images:
        """Images as they are scored, labelled with the data set's class ids (void 255).

        Args:
            positions: in the split's list; None for all.
            split: "test", or "train" to score training images as test images are.
        """
        table = np.full(256, IGNORE, np.uint8)
        for value, c in self.protocol.dataset.raw_to_id().items():
            table[value] = c
        names = self.index[split].names
        chosen = names if positions is None else [names[i] for i in positions]
        return Images(self.store(split), chosen, table, "center-crop", self.config.crop)

    # ---- batches -------------------------------------------------------------------------------------------

    def loader(
        self,
        images: Samples,
        epoch: int,
        purpose: str = "train",
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> Loader:
        """Batches of one epoch. The same purpose and epoch give the same batches, always."""
        key = (id(images), purpose)
        if key not in self._loaders:
            self._loaders[key] = self._new_loader(images, purpose, shuffle, drop_last, persistent=True)
        self._loaders[key].sampler.epoch = epoch
        return self._loaders[key]

    def _new_loader(
        self, images: Samples, purpose: str, shuffle: bool, drop_last: bool, persistent: bool
    ) -> Loader:
        sampler = EpochSampler(
            len(images),
            self.config.batch_size,
            mix(self.seed, self.step.index, purpose),
            shuffle,
            drop_last,
            self.rank,
            self.world,
            self.smoke if drop_last else None,
        )
        return Loader(images, sampler, self.workers, self.pin, persistent)

    @contextlib.contextmanager
    def once(
        self, images: Samples, purpose: str, shuffle: bool = True, drop_last: bool = False, epoch: int = 0
    ) -> Iterator[Loader]:
        """A loader for one pass, whose processes end with it."""
        loader = self._new_loader(images, purpose, shuffle, drop_last, persistent=False)
        loader.sampler.epoch = epoch
        try:
            yield loader
        finally:
            loader.close()

    def stream(self, epoch: int = 0, whole: bool = False, images: Samples | None = None) -> Iterator[Batch]:
        """The training batches of an epoch on the device, for a pass without training.

        Args:
            epoch: which one.
            whole: also the last, incomplete batch.
            images: instead of the step's training images.
        """
        assert self.prepare is not None
        images, purpose = self.train if images is None else images, "whole" if whole else "train"
        with self.once(images, purpose, drop_last=not whole, epoch=epoch) as loader:
            yield from map(self.prepare, itertools.islice(loader, self.smoke))
