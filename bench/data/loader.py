"""Images of a step on their way to the network: decode, remap, augment, batch.

A sample is drawn from (seed, step, epoch, position) alone, so batches are the same whatever the number of workers, and an
interrupted epoch is repeated exactly.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.data.augment import AUGMENTATIONS, to_arrays
from bench.data.dataset import Files
from bench.data.index import ClassIndex
from bench.data.labels import lookup_table, rule, training_table
from bench.errors import UserError
from bench.protocol import Protocol, Step
from bench.seeds import mix

if TYPE_CHECKING:
    from bench.train import Batch

CACHE_BYTES = 2_000_000_000
"""A split whose decoded images fit into this is decoded once and kept in memory."""

Sample = dict[str, Any]


class ImageStore:
    """Decoded files of a split, kept in memory if the split is small."""

    def __init__(self, files: Files, keep: bool | None = None) -> None:
        self.files = files
        self._kept: dict[tuple[str, bool], list[Image.Image]] = {}
        self._keep = self._fits() if keep is None else keep

    def _fits(self) -> bool:
        first = _open(self.files.image(self.files.names[0]))
        return first.width * first.height * 5 * len(self.files.names) < CACHE_BYTES

    def maps(self, name: str, saliency: bool) -> list[Image.Image]:
        """Image (RGB), raw mask (L) and, if asked for, saliency map (L) of one name.

        Raises:
            UserError: a file that is missing or cut off, or maps of different sizes.
        """
        found = self._kept.get((name, saliency))
        if found is None:
            found = [_open(self.files.image(name)).convert("RGB"), _indexed(_open(self.files.mask(name)))]
            if saliency:
                path = self.files.saliency(name)
                if path is None:
                    raise UserError(f"data set {self.files.dataset.name!r} has no saliency maps")
                found.append(_indexed(_open(path)))
            for m in found[1:]:
                if m.size != found[0].size:
                    raise UserError(f"{self.files.image(name)}: {found[0].size} pixels, but its mask or saliency map has {m.size}")
            if self._keep:
                self._kept[name, saliency] = found
        return found


def _open(path: Any) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{path}: cannot decode this image: {error}") from None
    return image


def _indexed(image: Image.Image) -> Image.Image:
    """A palette or grey image as one byte a pixel, values untouched."""
    return image if image.mode == "L" else Image.fromarray(np.asarray(image))


@dataclass
class Images(Dataset):
    """Some images of a split with their labels in the view of a step.

    Attributes:
        store: decoded files.
        names: which images, in order.
        table: label of each mask value, uint8 [256].
        augmentation: a name of bench.data.augment.AUGMENTATIONS.
        crop: side of the result.
        saliency: also yield saliency maps.
    """

    store: ImageStore
    names: Sequence[str]
    table: np.ndarray
    augmentation: str
    crop: int
    saliency: bool = False
    _remap: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._remap = self.table.tolist()

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int, rng: random.Random) -> Sample:
        """{"image": uint8 [S, S, 3], "labels": uint8 [S, S]}, and "saliency" uint8 [S, S] if asked for."""
        image, mask, *more = self.store.maps(self.names[index], self.saliency)
        maps = AUGMENTATIONS[self.augmentation]([image, mask.point(self._remap), *more], self.crop, rng)
        return dict(zip(("images", "labels", "saliency"), to_arrays(maps), strict=False))

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, seed = item
        try:
            return {**self.sample(index, random.Random(seed)), "index": np.int64(index)}
        except UserError as error:  # a worker process can only hand values back
            return {"error": str(error)}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples stacked key by key into tensors; a sample that could not be read travels as its error."""
    for sample in samples:
        if "error" in sample:
            return {"error": sample["error"]}
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


class EpochSampler:
    """Batches of (position, seed) of one epoch; the share of one process where several train together."""

    def __init__(self, n: int, batch_size: int, seed: int, shuffle: bool, drop_last: bool, rank: int, world: int, limit: int | None) -> None:
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world, self.epoch = rank, world, 0
        whole = n // batch_size if drop_last else -(-n // batch_size)
        self.n_batches = whole if limit is None else limit
        self.repeat = limit is not None

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.n))
        if self.shuffle:
            random.Random(mix(self.seed, "order", self.epoch)).shuffle(order)
        if self.repeat:  # a smoke run fills its few batches however few images there are
            order = (order * (self.n_batches * self.batch_size // self.n + 1))[: self.n_batches * self.batch_size]
        for b in range(self.n_batches):
            batch = list(enumerate(order[b * self.batch_size : (b + 1) * self.batch_size]))[self.rank :: self.world]
            if batch:  # the last one may have fewer images than there are processes
                yield [(i, mix(self.seed, self.epoch, b, k, i)) for k, i in batch]


def _leave_signals_to_the_job(worker: int) -> None:
    """Stopping or putting a job back into the queue is for its main process to answer; its loaders end with it."""
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class Loader:
    """An epoch's batches as tensors; errors of worker processes surface as themselves."""

    def __init__(self, dataset: Dataset, sampler: EpochSampler, workers: int, pin: bool) -> None:
        self.sampler = sampler
        self._loader = DataLoader(
            dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, pin_memory=pin, persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_job,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._loader:
            if "error" in batch:
                raise UserError(batch["error"])
            yield batch


@dataclass
class StepData:
    """What a step may see: its images, those of earlier steps, and the test images.

    Attributes:
        protocol, step: what is learned.
        files, index: files and class index of "train" and "test".
        values: the settings in force (crop, augmentation, label_rule, batch_size).
        seed: of the run.
        rank, world: this process among those that train together.
        workers: data-loading processes.
        pin: pin memory for copies to a GPU.
        smoke: batches of an epoch in a smoke run, else None.
        saliency: training samples carry saliency maps.
        prepare: turns a loader's batch into one on the device; set by the engine.
    """

    protocol: Protocol
    step: Step
    files: Mapping[str, Files]
    index: Mapping[str, ClassIndex]
    values: Mapping[str, Any]
    seed: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    pin: bool = False
    smoke: int | None = None
    saliency: bool = False
    prepare: Callable[[dict[str, Any]], Batch] | None = None

    def __post_init__(self) -> None:
        self._stores: dict[str, ImageStore] = {}
        self._loaders: dict[tuple[int, str], Loader] = {}
        if self.values["batch_size"] % self.world:
            raise UserError(f"batch_size = {self.values['batch_size']} is the size over all processes and does not divide by {self.world} processes")

    @functools.cached_property
    def train(self) -> Images:
        """Training images of this step."""
        return self.images(self.step.index)

    def stream(self, epoch: int = 0, whole: bool = False, images: Images | None = None) -> Iterator[Batch]:
        """The training batches of an epoch on the device, for a pass without training.

        Args:
            epoch: which one.
            whole: also the last, incomplete batch.
            images: instead of the step's training images.
        """
        assert self.prepare is not None
        images, purpose = self.train if images is None else images, "whole" if whole else "train"
        yield from map(self.prepare, itertools.islice(self.loader(images, epoch, purpose, drop_last=not whole), self.smoke))
        if whole:  # needed once a step: its worker processes end with it
            del self._loaders[id(images), purpose]

    def store(self, split: str) -> ImageStore:
        if split not in self._stores:
            self._stores[split] = ImageStore(self.files[split])
        return self._stores[split]

    def names(self, index: int) -> list[str]:
        """Names of the training images of a step, in list order."""
        index_of = self.index["train"]
        chosen = rule(self.values["label_rule"]).images("train", self.protocol, index, index_of.presence)
        return [index_of.names[i] for i in chosen]

    def images(self, index: int, names: Sequence[str] | None = None, augmentation: str | None = None, table: np.ndarray | None = None) -> Images:
        """Training images of step `index` as that step labels them.

        Args:
            index: the step.
            names: some images only.
            augmentation: instead of the training one, for example "center-crop".
            table: another label view, uint8 [256].
        """
        return Images(
            self.store("train"),
            self.names(index) if names is None else names,
            training_table(self.protocol, index, self.values["label_rule"]) if table is None else table,
            augmentation or self.values["augmentation"],
            self.values["crop"],
            self.saliency,
        )

    def all_seen_table(self) -> np.ndarray:
        """The label view in which every class up to this step keeps its channel (for rehearsed images), uint8 [256]."""
        from bench.data.labels import INDEX, View

        return lookup_table(View(0, INDEX, 0, 255), self.protocol.dataset, self.protocol.order, self.step)

    def loader(self, images: Dataset, epoch: int, purpose: str = "train", shuffle: bool = True, drop_last: bool = True) -> Loader:
        """Batches of one epoch. The same purpose and epoch give the same batches, always."""
        key = (id(images), purpose)
        if key not in self._loaders:
            sampler = EpochSampler(
                len(images), self.values["batch_size"], mix(self.seed, self.step.index, purpose), shuffle, drop_last,  # type: ignore[arg-type]
                self.rank, self.world, self.smoke if drop_last else None,
            )  # fmt: skip
            self._loaders[key] = Loader(images, sampler, self.workers, self.pin)
        self._loaders[key].sampler.epoch = epoch
        return self._loaders[key]

    def test_images(self, positions: Sequence[int] | None = None) -> Images:
        """Test images as they are scored, labelled with the data set's class ids (void 255)."""
        table = np.full(256, 255, np.uint8)
        for value, c in self.protocol.dataset.raw_to_id().items():
            table[value] = c
        names = self.index["test"].names
        chosen = names if positions is None else [names[i] for i in positions]
        return Images(self.store("test"), chosen, table, "center-crop", self.values["crop"])


def default_workers(on_gpu: bool, processes: int = 1) -> int:
    """Loading processes: none where the processor trains, else this process's share of the cores, 8 at most."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // processes)) if on_gpu else 0
