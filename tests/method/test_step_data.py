"""What a step may see: which images, in which view of their labels, with which maps and classes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.data.dataset import IGNORE
from bench.data.index import class_indexes
from bench.data.locate import locate
from bench.errors import UserError
from bench.method.settings import Settings
from bench.method.step_data import StepData
from bench.protocol.file import load

Toy = Callable[..., Path]
Batches = list[dict[str, torch.Tensor]]


def data_of(path: Path, index: int = 0, settings: dict[str, Any] | None = None, **more: Any) -> StepData:
    """Data of a step of a throw-away benchmark."""
    p, config = load(path), Settings(**{"crop": 24, "batch_size": 4, **(settings or {})})
    found = class_indexes(p.dataset)
    return StepData(p, p.step(index), locate(p.dataset), found, config, more.pop("seed", 0), **more)


def batches(data: StepData, epoch: int) -> Batches:
    return list(data.loader(data.train, epoch))


def same(a: Batches, b: Batches) -> bool:
    return len(a) == len(b) and all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in x)


def test_batches_follow_from_seed_step_and_epoch_alone(toy: Toy) -> None:
    path = toy()
    first = batches(data_of(path), 3)
    assert same(first, batches(data_of(path), 3))
    assert not same(first, batches(data_of(path), 4))
    assert not same(first, batches(data_of(path, seed=1), 3))
    with_workers = data_of(path, workers=2)
    assert same(first, batches(with_workers, 3))
    assert len(multiprocessing.active_children()) == 2  # they wait for the next epoch
    with_workers.close()
    assert multiprocessing.active_children() == []


def test_an_epoch_sees_each_image_once_and_drops_the_last_part(toy: Toy) -> None:
    data = data_of(toy(images=26), settings={"batch_size": 5})
    seen = [int(i) for batch in batches(data, 0) for i in batch["index"]]
    assert len(seen) == len(set(seen)) == len(data.train) // 5 * 5


def test_processes_share_a_batch(toy: Toy) -> None:
    path = toy()
    whole = batches(data_of(path), 0)
    parts = [batches(data_of(path, rank=rank, world=2), 0) for rank in (0, 1)]
    for k, batch in enumerate(whole):
        for name, values in batch.items():
            assert (values[0::2] == parts[0][k][name]).all()
            assert (values[1::2] == parts[1][k][name]).all()


def test_a_batch_that_does_not_divide_is_refused(toy: Toy) -> None:
    words = "batch_size = 4 is the size over all processes and does not divide by 3"
    with pytest.raises(UserError, match=words):
        data_of(toy(), world=3)


def test_labels_are_in_the_view_of_the_step(toy: Toy) -> None:
    for batch in batches(data_of(toy(n_classes=4), index=1), 0):
        assert set(batch["labels"].unique().tolist()) <= {0, 3, 255}
        assert batch["images"].dtype == torch.uint8
        assert batch["images"].shape == (4, 24, 24, 3)


def test_test_images_keep_class_ids(toy: Toy) -> None:
    data = data_of(toy(n_classes=4))
    with data.once(data.test_images(), "test", shuffle=False) as loader:
        found = list(loader)
    assert set(torch.cat([batch["labels"].flatten() for batch in found]).unique().tolist()) == {0, 1, 2, 3, 4}
    assert [int(i) for batch in found for i in batch["index"]] == list(range(12))
    assert not any("classes" in batch for batch in found)


def test_training_images_can_be_scored_as_test_images_are(toy: Toy) -> None:
    data = data_of(toy(n_classes=4), index=1)
    images = data.test_images([3, 5], "train")
    assert list(images.names) == ["train003", "train005"]
    assert set(np.unique(images[0, 0]["labels"])) == {0, 1, 4}  # class ids, whatever the step


def test_named_maps_travel_with_the_image(toy: Toy, in_tmp: Path) -> None:
    path = toy()
    batch = batches(data_of(path, maps=("saliency",)), 0)[0]
    assert ((batch["saliency"] > 0) >= ((batch["labels"] > 0) & (batch["labels"] < 255))).all()
    assert "saliency" not in batches(data_of(path), 0)[0]
    (in_tmp / "toy/saliency/train000.png").unlink()
    with pytest.raises(UserError, match=r"saliency/train000\.png: no such file"):
        batches(data_of(path, maps=("saliency",)), 0)


@pytest.mark.parametrize("padding", [0, 7])
def test_beyond_the_border_a_named_map_has_its_padding(toy: Toy, in_tmp: Path, padding: int) -> None:
    path, declared = toy(), in_tmp / "toy-set.toml"
    declared.write_text(f"{declared.read_text()}padding = {padding}\n")
    settings = {"augmentation": "scale-crop", "crop": 60}  # images of 32 pixels grow to 64 at most
    found = batches(data_of(path, settings=settings, maps=("saliency",)), 0)
    values = torch.cat([batch["saliency"].flatten() for batch in found])
    assert set(values.unique().tolist()) == {0, 255} | {padding}


def test_a_smoke_run_fills_its_batches_from_few_images(toy: Toy) -> None:
    data = data_of(toy(images=6), smoke=2, settings={"batch_size": 8})
    assert [len(batch["images"]) for batch in batches(data, 0)] == [8, 8]


def test_rehearsed_images_keep_all_seen_classes(toy: Toy) -> None:
    table = data_of(toy(n_classes=4), index=1).all_seen_table()
    assert table[:5].tolist() == [0, 1, 2, 3, 0]
    assert isinstance(table, np.ndarray)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("rule", ["plop", "mib", "ssul"])
def test_a_batch_tells_the_classes_that_each_whole_image_shows(toy: Toy, index: int, rule: str) -> None:
    """Held against the whole masks in the view of the step; old and future classes are not told."""
    data = data_of(toy(n_classes=4, size=48), index=index, settings={"crop": 8, "label_rule": rule})
    mask_of = data.store("train").maps
    told = 0
    for batch in batches(data, 0):
        assert batch["classes"].dtype == torch.bool
        assert batch["classes"].shape == (4, data.step.n_classes)
        for row, position in zip(batch["classes"].tolist(), batch["index"].tolist(), strict=True):
            raw = np.asarray(mask_of(data.train.names[position])[1])
            labels = set(np.unique(data.train.table[raw]).tolist()) - {0, IGNORE}
            assert {c for c, shows in enumerate(row) if shows} == labels
            told += len(labels)
    assert told


def test_images_of_an_earlier_step_tell_their_own_classes(toy: Toy) -> None:
    data = data_of(toy(n_classes=4), index=2)
    sample = data.images(0, ["train000"])[0, 0]  # it shows classes 1 and 2, which step 0 learns
    assert np.asarray(sample["classes"]).tolist() == [False, True, True, False, False]
