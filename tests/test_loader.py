from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.data.dataset import locate
from bench.data.index import class_index
from bench.data.loader import StepData
from bench.errors import UserError
from bench.protocol import load

Toy = Callable[..., Path]
VALUES = {"crop": 24, "augmentation": "random-resized-crop", "label_rule": "plop", "batch_size": 4}


def data_of(path: Path, index: int = 0, **more: Any) -> StepData:
    p = load(path)
    found = {split: class_index(p.dataset, split=split) for split in ("train", "test")}
    return StepData(p, p.step(index), locate(p.dataset), found, {**VALUES, **more.pop("values", {})}, seed=more.pop("seed", 0), **more)


def batches(data: StepData, epoch: int) -> list[dict[str, torch.Tensor]]:
    return list(data.loader(data.train, epoch))


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in x)


def test_batches_follow_from_seed_and_epoch_alone(toy: Toy) -> None:
    path = toy()
    first = batches(data_of(path), 3)
    assert same(first, batches(data_of(path), 3))
    assert same(first, batches(data_of(path, workers=2), 3))
    assert not same(first, batches(data_of(path), 4))
    assert not same(first, batches(data_of(path, seed=1), 3))


def test_an_epoch_sees_each_image_once_and_drops_the_last_part(toy: Toy) -> None:
    data = data_of(toy(images=26), values={"batch_size": 5})
    seen = [int(i) for batch in batches(data, 0) for i in batch["index"]]
    assert len(seen) == len(set(seen)) == len(data.train) // 5 * 5


def test_processes_share_a_batch(toy: Toy) -> None:
    path = toy()
    whole = batches(data_of(path), 0)
    parts = [batches(data_of(path, rank=rank, world=2), 0) for rank in (0, 1)]
    for k, batch in enumerate(whole):
        assert (batch["images"][0::2] == parts[0][k]["images"]).sum() > 0
        assert sorted(batch["index"].tolist()) == sorted(parts[0][k]["index"].tolist() + parts[1][k]["index"].tolist())


def test_a_batch_that_does_not_divide_is_refused(toy: Toy) -> None:
    with pytest.raises(UserError, match="batch_size = 4 is the size over all processes and does not divide by 3"):
        data_of(toy(), world=3)


def test_labels_are_in_the_view_of_the_step(toy: Toy) -> None:
    data = data_of(toy(n_classes=4), index=1)
    for batch in batches(data, 0):
        assert set(batch["labels"].unique().tolist()) <= {0, 3, 255}
        assert batch["images"].dtype == torch.uint8
        assert batch["images"].shape == (4, 24, 24, 3)


def test_test_images_keep_class_ids(toy: Toy) -> None:
    data = data_of(toy(n_classes=4))
    loader = data.loader(data.test_images(), 0, purpose="test", shuffle=False, drop_last=False)
    ids = torch.cat([batch["labels"].flatten() for batch in loader]).unique().tolist()
    assert set(ids) == {0, 1, 2, 3, 4}
    assert sum(len(batch["index"]) for batch in loader) == len(data.index["test"].names)


def test_saliency_maps_travel_with_the_image(toy: Toy, in_tmp: Path) -> None:
    path = toy()
    batch = batches(data_of(path, saliency=True), 0)[0]
    assert ((batch["saliency"] > 0) >= (batch["labels"] > 0)).all()
    (in_tmp / "toy/saliency/train000.png").unlink()
    with pytest.raises(UserError, match=r"saliency/train000\.png: no such file"):
        batches(data_of(path, saliency=True), 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_from_any_process(toy: Toy, in_tmp: Path, workers: int) -> None:
    path = toy()
    data = data_of(path, workers=workers)
    for image in (in_tmp / "toy/images").glob("train*.png"):
        image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=r"images/train\d+\.png: cannot decode this image"):
        batches(data, 0)


def test_a_smoke_run_fills_its_batches_from_few_images(toy: Toy) -> None:
    data = data_of(toy(images=6), smoke=2, values={"batch_size": 8})
    assert [len(batch["images"]) for batch in batches(data, 0)] == [8, 8]


def test_rehearsed_images_keep_all_seen_classes(toy: Toy) -> None:
    table = data_of(toy(n_classes=4), index=1).all_seen_table()
    assert table[:5].tolist() == [0, 1, 2, 3, 0]
    assert isinstance(table, np.ndarray)
