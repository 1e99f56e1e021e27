"""Geometric augmentation of an image with its labels and its other maps, as the authors do it.

Images are PIL images; the result is uint8 arrays. Images are resampled bilinearly, all maps by nearest
neighbour. All draws come from one `random.Random`, in the authors' order, so that a seed reproduces their
crops.

Source: spec/protocol.md section 4 (MiB, PLOP, NeST, EIR), spec/ssul.md section 8, spec/mbs.md section 3.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from bench.names import Registry

if TYPE_CHECKING:
    import numpy as np

AREA = (0.5, 2.0)
"""Range of the crop's area as a share of the image's; above 1 it never fits, which is the authors' doing."""
ASPECT = (3 / 4, 4 / 3)
SCALE = (0.5, 2.0)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Maps = list[Image.Image]
"""Image first, then label map, then any named maps; all of one size."""


class Augmentation(Protocol):
    """Cuts a square of side `size` out of maps; `padding` is each map's value beyond the image's border."""

    def __call__(self, maps: Maps, size: int, rng: random.Random, *, padding: Sequence[int] = ()) -> Maps: ...


def _resample(maps: Maps) -> list[tuple[Image.Image, Image.Resampling]]:
    return [(m, Image.Resampling.NEAREST if k else Image.Resampling.BILINEAR) for k, m in enumerate(maps)]


def resize(maps: Maps, width: int, height: int) -> Maps:
    """All maps resized, the image bilinearly, the others by nearest neighbour."""
    if maps[0].size == (width, height):
        return maps
    return [m.resize((width, height), how) for m, how in _resample(maps)]


def resize_short_side(maps: Maps, size: int) -> Maps:
    """The shorter side becomes `size`; the other int(size * long / short)."""
    width, height = maps[0].size
    if width <= height:
        return resize(maps, size, int(size * height / width))
    return resize(maps, int(size * width / height), size)


def draw_crop(
    width: int,
    height: int,
    rng: random.Random,
    area: Sequence[float] = AREA,
    aspect: Sequence[float] = ASPECT,
) -> tuple[int, int, int, int]:
    """A crop of random area and aspect: (top, left, height, width).

    Ten draws; the first that fits is taken. Otherwise the largest central crop whose aspect (width / height)
    is allowed.
    """
    for _ in range(10):
        target = rng.uniform(*area) * width * height
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = width, height
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


def flip(maps: Maps, rng: random.Random) -> Maps:
    """Mirrored left to right with probability one half."""
    return [m.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for m in maps] if rng.random() < 0.5 else maps


def random_resized_crop(
    maps: Maps,
    size: int,
    rng: random.Random,
    area: Sequence[float] = AREA,
    aspect: Sequence[float] = ASPECT,
    *,
    padding: Sequence[int] = (),
) -> Maps:
    """MiB, PLOP, NeST, EIR: random crop, resized to size x size (aspect not kept), flip."""
    top, left, h, w = draw_crop(*maps[0].size, rng, area, aspect)
    return flip(resize([m.crop((left, top, left + w, top + h)) for m in maps], size, size), rng)


def pad(maps: Maps, border: int, padding: Sequence[int] = ()) -> Maps:
    """All four sides padded, each map with its own value: 0 is black, background, not salient.

    Args:
        maps: of one size.
        border: pixels on each side.
        padding: value of each map; 0 for those that it does not name.
    """
    width, height = maps[0].size
    padded = []
    for k, m in enumerate(maps):
        canvas = Image.new(
            m.mode, (width + 2 * border, height + 2 * border), padding[k] if k < len(padding) else 0
        )
        canvas.paste(m, (border, border))
        padded.append(canvas)
    return padded


def random_crop(maps: Maps, size: int, rng: random.Random, padding: Sequence[int] = ()) -> Maps:
    """A random size x size window, padded where the image is smaller. Padding is background, not ignored."""
    if maps[0].width < size:
        maps = pad(maps, int((1 + size - maps[0].width) / 2), padding)
    if maps[0].height < size:
        maps = pad(maps, int((1 + size - maps[0].height) / 2), padding)
    width, height = maps[0].size
    top = left = 0
    if (width, height) != (size, size):
        top, left = rng.randint(0, height - size), rng.randint(0, width - size)
    return [m.crop((left, top, left + size, top + size)) for m in maps]


def scale_crop(
    maps: Maps, size: int, rng: random.Random, scale: Sequence[float] = SCALE, *, padding: Sequence[int] = ()
) -> Maps:
    """SSUL: both sides scaled by U(0.5, 2), random crop with padding, flip."""
    factor = rng.uniform(*scale)
    width, height = maps[0].size
    return flip(random_crop(resize(maps, int(width * factor), int(height * factor)), size, rng, padding), rng)


def resize_scale_crop(
    maps: Maps, size: int, rng: random.Random, scale: Sequence[float] = SCALE, *, padding: Sequence[int] = ()
) -> Maps:
    """MBS: the shorter side to `size` first, then as SSUL."""
    return scale_crop(resize_short_side(maps, size), size, rng, scale, padding=padding)


def center_crop(
    maps: Maps, size: int, rng: random.Random | None = None, *, padding: Sequence[int] = ()
) -> Maps:
    """Test, for everybody: the shorter side to `size`, then the central square. Scores are measured on it."""
    maps = resize_short_side(maps, size)
    width, height = maps[0].size
    top, left = round((height - size) / 2), round((width - size) / 2)
    return [m.crop((left, top, left + size, top + size)) for m in maps]


AUGMENTATIONS: Registry[Augmentation] = Registry("augmentation", "bench.augmentations")
AUGMENTATIONS.add("random-resized-crop", random_resized_crop)
AUGMENTATIONS.add("scale-crop", scale_crop)
AUGMENTATIONS.add("resize-scale-crop", resize_scale_crop)
AUGMENTATIONS.add("center-crop", center_crop)


def to_arrays(maps: Maps) -> list[np.ndarray]:
    """uint8 arrays: the image [H, W, 3], every other map [H, W]."""
    import numpy as np

    return [np.asarray(m) for m in maps]
