"""Crops: every map moves with its image, and what lies beyond the border is each map's own affair."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from bench.data.augment import AUGMENTATIONS, pad, to_arrays
from bench.errors import UserError


def maps(width: int = 40, height: int = 30) -> list[Image.Image]:
    """An image and two maps that say the same."""
    value = np.random.default_rng(0).integers(1, 255, (height, width), np.uint8)
    return [Image.fromarray(np.stack([value] * 3, -1)), Image.fromarray(value), Image.fromarray(value)]


@pytest.mark.parametrize("name", AUGMENTATIONS.known())
def test_all_maps_are_cut_alike(name: str) -> None:
    """A map that is constant along columns, and rises to the right: the image shows the same, but for the
    blur of its resampling. Of a mirrored, shifted or differently scaled one it would not."""
    ramp = np.tile(np.arange(1, 241, 6, dtype=np.uint8), (30, 1))
    both = [Image.fromarray(np.stack([ramp] * 3, -1)), Image.fromarray(ramp), Image.fromarray(ramp)]
    flipped = set()
    for seed in range(20):
        image, labels, other = to_arrays(AUGMENTATIONS.find(name)(both, 24, random.Random(seed)))
        assert image.shape == (24, 24, 3)
        assert (labels == other).all()
        inside = labels > 0  # padding is 0
        far = np.abs(image[..., 0].astype(int) - labels)[inside]
        assert np.median(far) <= 6
        row = labels[inside.any(1)][0].astype(int)
        flipped.add(bool(row[row > 0][0] > row[row > 0][-1]))
    assert flipped == ({False} if name == "center-crop" else {False, True})


def test_a_seed_reproduces_a_crop() -> None:
    augmentation = AUGMENTATIONS.find("scale-crop")
    first, again, other = (to_arrays(augmentation(maps(), 24, random.Random(s))) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["scale-crop", "resize-scale-crop"])
def test_each_map_is_padded_with_its_own_value(name: str) -> None:
    beyond: set[int] = set()
    for seed in range(20):
        cut = AUGMENTATIONS.find(name)(maps(12, 12), 64, random.Random(seed), padding=[0, 0, 200])
        _, labels, other = to_arrays(cut)
        beyond |= set(other[labels == 0].tolist())
    assert beyond == {200}


def test_padding_is_0_unless_told() -> None:
    image, labels, other = to_arrays(pad(maps(), 2))
    assert image[0, 0].tolist() == [0, 0, 0]
    assert labels[0, 0] == other[0, 0] == 0
    assert to_arrays(pad(maps(), 2, [0, 0, 7]))[2][0].tolist() == [7] * 44


def test_an_unknown_augmentation() -> None:
    with pytest.raises(UserError, match="unknown augmentation 'scale-cropp'; did you mean 'scale-crop'"):
        AUGMENTATIONS.find("scale-cropp")
