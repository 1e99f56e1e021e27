"""SSUL-M: its memory, the labels of what comes back, and what it shares with SSUL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import images_of, memory_of, records_of
from plans import config_of
from torch import nn

import bench
from bench.api import Run
from bench.method.batch import Batch
from bench.method.registry import method
from bench.method.resolve import resolve
from bench.method.settings import TRAINING
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.store.results import Store
from methods.ssul import BACKGROUND, UNKNOWN, bce_ignore_multi_head
from methods.ssul_m import SSULM

Toy = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def artifacts(run: Run, name: str) -> list[Path]:
    """Artifact folders of a method's steps."""
    chain = next(c for c in run.plan.chains if c.method.partition("[")[0] == name)
    return [Store("results").artifact(key) for key in chain.keys]


def train(protocol: Path, methods: list[str], settings: list[str]) -> Run:
    run = bench.run(str(protocol), methods, cluster="inline", set=settings, results="results")
    assert run.outcome.ok
    return run


def test_step_0_is_that_of_ssul_in_every_track(toy: Toy) -> None:
    for protocol in ("voc-15-1", "ade-100-10", "camvid-6-1", "shapes-6-2"):
        for track in ("published", "controlled", "small"):
            if track == "published" and not protocol.startswith(("voc", "ade")):
                continue
            with_memory, without = (
                resolve(method(name), load(protocol), track).config for name in ("ssul-m", "ssul")
            )
            assert {
                name: getattr(with_memory, name) for name in (*TRAINING, *type(without).model_fields)
            } == without.model_dump()
    plan = make_plan([str(toy())], ["ssul", "ssul-m"], overrides=["batch_size=4"])
    plain, memory = (chain.keys for chain in plan.chains)
    assert plain[0] == memory[0]
    assert not set(plain[1:]) & set(memory[1:])


def test_published_memory_sizes() -> None:
    assert config_of("ssul-m", "voc-15-1").memory_size == 100
    assert config_of("ssul-m", "ade-100-10").memory_size == 300


def test_memory_is_handed_from_step_to_step_and_in_the_artifact(toy: Toy, quick: list[str]) -> None:
    protocol = toy(n_classes=4, images=32, first=2, then=1)
    first, second, third = artifacts(train(protocol, ["ssul-m"], [*quick, "memory_size=6"]), "ssul-m")
    assert memory_of(first) == []
    records = {}
    for folder in (second, third):
        records[folder] = records_of(folder)
        assert len(records[folder]) == 6
        assert memory_of(folder) == sorted(record.name for record in records[folder])
    images = {t: set(images_of(protocol)[t]) for t in (0, 1)}
    assert {record.drawn_for for record in records[second]} == {1, 2}
    assert {record.drawn_for for record in records[third]} == {1, 2, 3}
    assert {record.name for record in records[second]} <= images[0]
    before = {record.name for record in records[second]}
    assert {record.name for record in records[third]} <= before | images[1]
    assert before & {record.name for record in records[third]}


def test_no_memory_is_ssul_bit_for_bit(toy: Toy, quick: list[str]) -> None:
    run = train(toy(then=2), ["ssul", "ssul-m"], [*quick, "ssul-m.memory_size=0"])
    plain, without = (artifacts(run, name)[-1] for name in ("ssul", "ssul-m"))
    assert plain != without
    for name in ("model.safetensors", "train.jsonl", "confusion.npz"):
        assert (plain / name).read_bytes() == (without / name).read_bytes()
    assert memory_of(without) == []


def test_memory_changes_what_is_learned_and_so_do_its_labels(toy: Toy, quick: list[str]) -> None:
    protocol = toy(then=2)
    settings = (["memory_size=0"], ["memory_size=4"], ["memory_size=4", "memory_labels=shifted"])
    runs = [artifacts(train(protocol, ["ssul-m"], [*quick, *more]), "ssul-m")[-1] for more in settings]
    assert len({(folder / "model.safetensors").read_bytes() for folder in runs}) == len(runs)


def test_a_memory_larger_than_the_images_holds_them_all(toy: Toy, quick: list[str]) -> None:
    protocol = toy(n_classes=4, images=20, then=2)
    last = artifacts(train(protocol, ["ssul-m"], [*quick, "memory_size=1000"]), "ssul-m")[-1]
    memory = memory_of(last)
    assert len(memory) == len(set(memory))
    assert set(memory) == set(images_of(protocol)[0])


def test_without_a_valid_pixel_the_mean_is_of_nothing_and_nothing_is_learned() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = bce_ignore_multi_head(logits, torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss.isnan()
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("unknown", [True, False])
def test_labels_from_memory_are_as_published_or_shifted(unknown: bool) -> None:
    labels = torch.tensor([[[0, 1, 2, 255]], [[0, 1, 2, 255]]])
    salient = torch.tensor([[[0, 0, 0, 0]], [[9, 9, 9, 9]]])
    extra: dict[str, Any] = {"saliency": salient, "replayed": torch.tensor([False, True])}
    batch = Batch(torch.zeros(2, 3, 1, 4), labels, nn.Identity(), None, extra)
    for how in ("as_published", "shifted"):
        encoded = SSULM(SSULM.Config(memory_labels=how, unknown=unknown)).encode(batch)
        if not unknown:
            assert torch.equal(encoded, labels)
            continue
        assert encoded[0].tolist() == [[BACKGROUND, 2, 3, 255]]
        assert encoded[1].tolist() == [[0, 1, 2, 255] if how == "as_published" else [UNKNOWN, 2, 3, 255]]


def test_footnotes_name_memory_annotation_and_labels() -> None:
    notes = SSULM.footnotes(SSULM.Config(memory_size=7))
    assert "memory of 7 images" in notes
    assert any("labels of all classes so far" in note for note in notes)
    assert any("not shifted" in note for note in notes)
    assert not any("not shifted" in note for note in SSULM.footnotes(SSULM.Config(memory_labels="shifted")))
    assert SSULM.footnotes(SSULM.Config(memory_size=0)) == []
