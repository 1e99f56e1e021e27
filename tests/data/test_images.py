"""Samples: image, labels in a view, named maps, and the classes that the whole image shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.data.dataset import load_dataset
from bench.data.images import Images, ImageStore
from bench.data.locate import locate
from bench.errors import UserError

Toy = Callable[..., Path]


def images_of(path: Path, split: str = "train", **more: Any) -> Images:
    """All images of a split, labelled with what their masks hold."""
    files = locate(load_dataset("toy-set.toml", beside=path))[split]
    table = more.pop("table", np.arange(256, dtype=np.uint8))
    augmentation = more.pop("augmentation", "center-crop")
    return Images(ImageStore(files, more.pop("keep", None)), files.names, table, augmentation, 24, **more)


def test_a_sample_follows_from_its_seed(toy: Toy) -> None:
    images = images_of(toy(), augmentation="random-resized-crop")
    a, b, c = images[3, 1], images[3, 1], images[3, 2]
    assert np.array_equal(a["images"], b["images"])
    assert not np.array_equal(a["images"], c["images"])
    assert a["index"] == 3
    assert list(a) == ["images", "labels", "index"]


def test_labels_are_what_the_table_makes_of_the_mask(toy: Toy) -> None:
    table = np.zeros(256, np.uint8)
    table[2] = 255
    labels = np.asarray(images_of(toy(), table=table)[1, 0]["labels"])
    assert labels.dtype == np.uint8
    assert labels.shape == (24, 24)
    assert set(np.unique(labels)) == {0, 255}


def test_named_maps_travel_with_the_image(toy: Toy, in_tmp: Path) -> None:
    path = toy()
    sample = images_of(path, maps=("saliency",))[0, 0]
    assert ((np.asarray(sample["saliency"]) > 0) == (np.asarray(sample["labels"]) > 0)).all()
    (in_tmp / "toy/saliency/train000.png").unlink()
    error = images_of(path, maps=("saliency",))[0, 0]["error"]
    assert str(error).endswith("saliency/train000.png: no such file")


def test_a_map_is_padded_with_the_value_that_the_data_set_declares(toy: Toy, in_tmp: Path) -> None:
    path = toy(size=16)
    settings = in_tmp / "toy-set.toml"
    settings.write_text(settings.read_text() + "padding = 77\n")
    images = images_of(path, augmentation="scale-crop", maps=("saliency",))
    found = [np.unique(np.asarray(images[i, i]["saliency"])).tolist() for i in range(len(images))]
    assert {77} <= {value for values in found for value in values} <= {0, 77, 255}


def test_the_classes_of_an_image(toy: Toy) -> None:
    path = toy()
    shows = np.eye(24, 5, dtype=bool)
    sample = images_of(path, classes=shows)[3, 0]
    assert np.asarray(sample["classes"]).tolist() == [False, False, False, True, False]
    assert "classes" not in images_of(path)[3, 0]


def test_a_split_without_the_maps(toy: Toy) -> None:
    error = images_of(toy(), "test", maps=("saliency",))[0, 0]["error"]
    assert error == "data set 'toy-set' has no saliency maps of its test images"


@pytest.mark.parametrize("keep", [True, False])
def test_decoded_images_are_kept_or_not(toy: Toy, in_tmp: Path, keep: bool) -> None:
    images = images_of(toy(), keep=keep)
    before = images[0, 0]["images"]
    Image.new("RGB", (32, 32)).save(in_tmp / "toy/images/train000.png")
    assert bool((images[0, 0]["images"] == before).all()) == keep  # type: ignore[union-attr]


def test_bilevel_and_palette_maps_are_one_byte_a_pixel(toy: Toy, in_tmp: Path) -> None:
    images = images_of(toy(), maps=("saliency",), keep=False)
    path, mask = in_tmp / "toy/saliency/train000.png", in_tmp / "toy/masks/train000.png"
    right = images[0, 0]
    Image.open(path).convert("1").save(path)
    palette = Image.fromarray(np.asarray(Image.open(mask))).convert("P")
    palette.putdata(list(np.asarray(Image.open(mask)).ravel()))
    palette.putpalette([200, 10, 10] * 256)
    palette.save(mask)
    found = images[0, 0]
    assert (found["saliency"] == right["saliency"]).all()  # type: ignore[union-attr]
    assert (found["labels"] == right["labels"]).all()  # type: ignore[union-attr]


def test_maps_of_another_size_or_kind(toy: Toy, in_tmp: Path) -> None:
    images = images_of(toy(), maps=("saliency",), keep=False)
    path = in_tmp / "toy/saliency/train000.png"
    Image.new("RGB", (32, 32)).save(path)
    with pytest.raises(UserError, match=r"saliency/train000\.png: mode 'RGB' is not one byte a pixel"):
        images.store.maps("train000", ("saliency",))
    Image.new("L", (31, 32)).save(path)
    with pytest.raises(
        UserError, match=r"images/train000\.png: \(32, 32\) pixels, but .*saliency.* has \(31, 32\)"
    ):
        images.store.maps("train000", ("saliency",))
