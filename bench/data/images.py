"""Images of a step on their way to the network: decode, remap, augment."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from bench.data.augment import AUGMENTATIONS, to_arrays
from bench.data.locate import Files
from bench.errors import UserError

CACHE_BYTES = 2_000_000_000
"""A split whose decoded images fit into this is decoded once and kept in memory."""

Sample = dict[str, np.ndarray | np.generic | bool | str]
"""What there is of one image, by name ("images", "labels", …); "error" alone if a file cannot be read."""


class Samples(Protocol):
    """Samples by (position, seed): what a loader reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, item: tuple[int, int]) -> Sample: ...


class ImageStore:
    """Decoded files of a split, kept in memory if the split is small.

    Args:
        files: of the split.
        keep: in memory; decided by size if None.
    """

    def __init__(self, files: Files, keep: bool | None = None) -> None:
        self.files = files
        self._kept: dict[tuple[str, tuple[str, ...]], list[Image.Image]] = {}
        self._keep = self._fits() if keep is None else keep

    def _fits(self) -> bool:
        first = _open(self.files.image(self.files.names[0]))
        return first.width * first.height * 5 * len(self.files.names) < CACHE_BYTES

    def maps(self, name: str, kinds: tuple[str, ...] = ()) -> list[Image.Image]:
        """Image (RGB), raw mask (L) and the named maps asked for (L) of one name.

        Raises:
            UserError: a file that is missing or cut off, or maps of different sizes.
        """
        found = self._kept.get((name, kinds))
        if found is None:
            others = [self.files.mask(name), *(self.files.map(kind, name) for kind in kinds)]
            image = _open(self.files.image(name)).convert("RGB")
            found = [image, *map(_one_byte, others)]
            for path, m in zip(others, found[1:], strict=True):
                if m.size != image.size:
                    raise UserError(f"{self.files.image(name)}: {image.size} pixels, but {path} has {m.size}")
            if self._keep:
                self._kept[name, kinds] = found
        return found


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{path}: cannot decode this image: {error}") from None
    return image


def _one_byte(path: Path) -> Image.Image:
    """A palette, grey or bilevel image as one byte a pixel; the values of a palette stay."""
    image = _open(path)
    if image.mode == "P":
        return Image.fromarray(np.asarray(image))
    if image.mode not in ("L", "1"):
        raise UserError(f"{path}: mode {image.mode!r} is not one byte a pixel")
    return image.convert("L")


@dataclass
class Images(Dataset):
    """Some images of a split with their labels in the view of a step.

    Attributes:
        store: decoded files.
        names: which images, in order.
        table: label of each mask value, uint8 [256].
        augmentation: a name of bench.data.augment.AUGMENTATIONS.
        crop: side of the result.
        maps: named maps that samples carry beside image and labels.
        classes: which classes each image shows, bool [N, C]; None if samples do not tell.
    """

    store: ImageStore
    names: Sequence[str]
    table: np.ndarray
    augmentation: str
    crop: int
    maps: tuple[str, ...] = ()
    classes: np.ndarray | None = None
    _remap: list[int] = field(init=False, repr=False)
    _padding: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._remap = self.table.tolist()
        declared = self.store.files.dataset.maps
        self._padding = [0, 0, *(declared[kind].padding if kind in declared else 0 for kind in self.maps)]
        self._augment = AUGMENTATIONS.find(self.augmentation)

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int, rng: random.Random) -> Sample:
        """One image, augmented.

        Args:
            index: position in `names`.
            rng: that augmentation draws from.

        Returns:
            "images" uint8 [S, S, 3], "labels" and named maps uint8 [S, S], and "classes" bool [C] if told.
        """
        image, mask, *more = self.store.maps(self.names[index], self.maps)
        maps = self._augment([image, mask.point(self._remap), *more], self.crop, rng, padding=self._padding)
        sample: Sample = dict(zip(("images", "labels", *self.maps), to_arrays(maps), strict=True))
        if self.classes is not None:
            sample["classes"] = self.classes[index]
        return sample

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        """The sample of (position, seed), with its position as "index"."""
        index, seed = item
        try:
            return {**self.sample(index, random.Random(seed)), "index": np.int64(index)}
        except UserError as error:  # a worker process can only hand values back
            return {"error": str(error)}
