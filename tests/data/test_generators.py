"""Data sets that are drawn."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bench.data import shapes
from bench.data.dataset import Dataset, load_dataset
from bench.data.generators import GENERATORS, ensure
from bench.errors import UserError


def test_a_drawn_data_set_lies_in_the_cache_and_is_drawn_once(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CISS_BENCH_CACHE", "kept")
    monkeypatch.setattr(shapes, "IMAGES", {"train": 2, "test": 1})
    root = ensure(load_dataset("shapes"))
    assert root == Path("kept/shapes-v1")
    assert sorted(path.name for path in root.iterdir()) == [
        "images",
        "masks",
        "saliency",
        "test.txt",
        "train.txt",
    ]
    monkeypatch.setattr(shapes, "draw", lambda root: pytest.fail("drawn again"))
    assert ensure(load_dataset("shapes")) == root
    assert [path.name for path in Path("kept").iterdir()] == ["shapes-v1"]


def test_what_cannot_be_drawn_leaves_nothing_half(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(root: Path) -> None:
        root.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes, "draw", full)
    with pytest.raises(
        UserError, match=r"'shapes' cannot be drawn into .*shapes-v1: No space left on device"
    ):
        ensure(load_dataset("shapes"))
    assert list(Path("data/cache").iterdir()) == []


def test_an_unknown_generator() -> None:
    about = load_dataset("shapes").model_dump()
    dataset = Dataset.model_validate({**about, "generator": "shape", "name": "mine"})
    with pytest.raises(
        UserError, match="data set 'mine': generator: unknown generator 'shape'; did you mean 'shapes'"
    ):
        ensure(dataset)


def test_shapes_stay_what_they_are() -> None:
    digest = hashlib.sha256()
    for split, number in (("train", 0), ("train", 1), ("test", 0), ("test", 199)):
        image, mask, salient = shapes.draw_image(split, number)
        assert (image.shape, image.dtype) == ((96, 96, 3), "uint8")
        for part in (mask, salient):  # colours could differ by one where a processor rounds sines otherwise
            digest.update(part.tobytes())
    assert digest.hexdigest()[:16] == "ec426ff3bb1ed85b"
    assert GENERATORS.find("shapes").VERSION == 1
