"""Batches follow from seed and epoch alone, and the processes that read them end when told."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from bench.data import cores
from bench.data.dataset import load_dataset
from bench.data.images import Images, ImageStore
from bench.data.loader import EpochSampler, Loader, Sample, collate, default_workers
from bench.data.locate import locate
from bench.errors import UserError

Toy = Callable[..., Path]


class Numbers(Dataset):
    """Samples that say which they are and from which seed they are drawn."""

    def __init__(self, n: int, worst: int = -1) -> None:
        self.n, self.worst = n, worst

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, seed = item
        return (
            {"error": f"{index} is bad"}
            if index == self.worst
            else {"index": np.int64(index), "seed": np.int64(seed)}
        )


def sampler(n: int = 24, size: int = 4, seed: int = 0, **more: Any) -> EpochSampler:
    return EpochSampler(n, size, seed, more.pop("shuffle", True), more.pop("drop_last", True), **more)


def batches(dataset: Dataset, epoch: int, workers: int = 0, **more: Any) -> list[dict[str, torch.Tensor]]:
    with Loader(dataset, sampler(len(dataset), **more), workers) as loader:  # type: ignore[arg-type]
        loader.sampler.epoch = epoch
        return list(loader)


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in x)


def toy_images(toy: Toy) -> Images:
    files = locate(load_dataset("toy-set.toml", beside=toy()))["train"]
    return Images(ImageStore(files), files.names, np.arange(256, dtype=np.uint8), "random-resized-crop", 24)


def test_batches_follow_from_seed_and_epoch_alone(toy: Toy) -> None:
    images = toy_images(toy)
    first = batches(images, 3)
    assert same(first, batches(images, 3))
    assert same(first, batches(images, 3, workers=2))
    assert not same(first, batches(images, 4))
    assert not same(first, batches(images, 3, seed=1))


def test_an_epoch_sees_each_image_once_and_drops_the_last_part() -> None:
    seen = [int(i) for batch in batches(Numbers(26), 0, size=5) for i in batch["index"]]
    assert len(seen) == len(set(seen)) == 25
    kept = batches(Numbers(26), 0, size=5, drop_last=False)
    assert [len(batch["index"]) for batch in kept] == [5] * 5 + [1]


def test_without_shuffling_images_come_in_order() -> None:
    assert [i for batch in batches(Numbers(8), 5, shuffle=False) for i in batch["index"].tolist()] == list(
        range(8)
    )


def test_processes_share_a_batch() -> None:
    whole = batches(Numbers(24), 0)
    parts = [batches(Numbers(24), 0, rank=rank, world=2) for rank in (0, 1)]
    for k, batch in enumerate(whole):
        for name in ("index", "seed"):
            assert batch[name].tolist()[0::2] == parts[0][k][name].tolist()
            assert batch[name].tolist()[1::2] == parts[1][k][name].tolist()


def test_a_smoke_run_fills_its_batches_from_few_images() -> None:
    assert [len(batch["index"]) for batch in batches(Numbers(6), 0, size=8, limit=2)] == [8, 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_named_from_any_process(workers: int) -> None:
    with pytest.raises(UserError, match="5 is bad"):
        batches(Numbers(24, worst=5), 0, workers)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_from_any_process(toy: Toy, in_tmp: Path, workers: int) -> None:
    images = toy_images(toy)
    for image in (in_tmp / "toy/images").glob("train*.png"):
        image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=r"images/train\d+\.png: cannot decode this image"):
        batches(images, 0, workers)


def test_five_passes_leave_no_process() -> None:
    """As five validations do: each loader is opened, read and left."""
    loader = Loader(Numbers(24), sampler(), workers=2)
    for _ in range(5):
        assert len(list(loader)) == 6
        assert multiprocessing.active_children() == []


def test_persistent_workers_wait_and_end_when_closed() -> None:
    loader = Loader(Numbers(24), sampler(), workers=2, persistent=True)
    list(loader)
    first = {process.pid for process in multiprocessing.active_children()}
    list(loader)
    assert {process.pid for process in multiprocessing.active_children()} == first
    assert len(first) == 2
    loader.close()
    assert multiprocessing.active_children() == []
    assert len(list(loader)) == 6  # others are started
    loader.close()
    loader.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("persistent", [True, False])
def test_a_pass_that_is_left_in_the_middle(persistent: bool) -> None:
    with Loader(Numbers(24), sampler(), workers=2, persistent=persistent) as loader:
        reader = iter(loader)
        first = list(itertools.islice(reader, 2))
        assert len(multiprocessing.active_children()) == 2
        if persistent:
            again = list(loader)
            assert same(first, again[:2])
            assert len(again) == 6
    assert multiprocessing.active_children() == []


def test_random_draws_of_training_do_not_depend_on_workers_or_on_what_was_read_before() -> None:
    """A step that is resumed has new workers; dropout must go on as if they were the old ones."""
    states = []
    for workers, persistent, before in ((0, False, 0), (2, True, 0), (2, True, 1), (2, False, 1)):
        with Loader(Numbers(24), sampler(), workers, persistent=persistent) as loader:
            for _ in range(before):
                list(loader)
            torch.manual_seed(1)
            list(loader)
            states.append(torch.rand(3).tolist())
    assert states.count(states[0]) == 4


def test_what_differs_by_sample_is_stacked_by_name() -> None:
    both = collate(
        [{"a": np.zeros((2, 2), np.uint8), "b": True}, {"a": np.ones((2, 2), np.uint8), "b": False}]
    )
    a, b = both["a"], both["b"]
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    assert torch.equal(a, torch.tensor([0, 1], dtype=torch.uint8)[:, None, None].expand(2, 2, 2))
    assert torch.equal(b, torch.tensor([True, False]))
    assert (a.dtype, b.dtype) == (torch.uint8, torch.bool)
    assert collate([{"b": True}, {"error": "bad"}]) == {"error": "bad"}


def test_loading_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_workers(on_gpu=False) == 0
    monkeypatch.setattr("bench.data.loader.cores", lambda: 12)
    assert [default_workers(True, n) for n in (1, 2, 100)] == [8, 6, 1]
    monkeypatch.delattr(cores.os, "sched_getaffinity")
    for said, n in ((5, 5), (None, 1)):
        monkeypatch.setattr(cores.os, "cpu_count", lambda said=said: said)
        assert cores.cores() == n
