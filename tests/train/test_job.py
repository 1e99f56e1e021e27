"""A job from its record to its artifact, and what stops one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import train, train_all

import bench
from bench.errors import TrainingError
from bench.plan.make import make_plan
from bench.score.conventions import CONVENTIONS
from bench.score.counts import read_counts
from bench.store.records import Environment, JobRecord, Metrics, read_record
from bench.store.results import Store
from bench.train.job import run_job
from bench.train.session import Session
from bench.train.tensors import read_tensors

Toy = Callable[..., Path]


def test_the_artifact_holds_what_the_design_says(toy: Toy, quick: list[str]) -> None:
    plan = make_plan([str(toy(then=2))], ["mib"], overrides=quick)
    store = Store("results")
    train_all(plan, store)
    first, key = plan.jobs
    folder = store.artifact(key)
    assert {p.name for p in folder.iterdir()} == {
        "job.json", "metrics.json", "confusion.npz", "model.safetensors", "state.safetensors", "state.json",
        "train.jsonl", "environment.json",
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(lines) == plan.jobs[key].iterations
    assert set(lines[0]) == {"phase", "epoch", "iteration", "lr", "ce", "kd"}
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    job = read_record(folder / JobRecord.file, JobRecord)
    assert job is not None
    assert job.inputs.parent == first
    assert job == plan.record(key)
    counts = read_counts(folder / "confusion.npz")
    assert len(counts.images) == 12
    assert counts.total().sum() == 12 * 32 * 32  # no void here: every pixel of the central crops
    metrics = store.metrics(key)
    assert metrics is not None
    assert set(metrics.scores) == set(CONVENTIONS.known())
    assert len(metrics.scores["default"].iou) == 5
    ran = [read_record(store.artifact(k) / Environment.file, Environment) for k in (first, key)]
    assert ran[0] is not None
    assert ran[1] is not None
    assert ran[1].packages["torch"] == torch.__version__.partition("+")[0]
    assert (ran[0].pretrained, ran[1].pretrained) == ("none: trained from scratch", "")
    assert (ran[0].threads, ran[0].processes) == (1, 1)
    assert not store.work(key).exists()


def test_learning_works_and_fine_tuning_forgets(toy: Toy) -> None:
    protocol = str(toy(n_classes=3, images=48, first=2, then=1))
    settings = ["first_epochs=12", "epochs=6", "batch_size=4", "crop=32"]
    run = bench.run(protocol, ["ft", "mib"], cluster="inline", set=settings, results="r")
    assert run.outcome.ok
    scores = {}
    for chain in run.plan.chains:
        first, last = (Store("r").metrics(chain.keys[t]) for t in (0, -1))
        assert isinstance(first, Metrics)
        assert isinstance(last, Metrics)
        scores[chain.method.partition("[")[0]] = (first.scores["default"].all, last.scores["default"].iou)
    old = {name: np.mean([float(v or 0) for v in iou[1:3]]) for name, (_, iou) in scores.items()}
    assert scores["ft"][0] is not None
    assert scores["ft"][0] > 0.6
    assert old["ft"] < 0.2  # old classes are gone
    assert old["mib"] > old["ft"] + 0.15


def test_a_loss_that_is_not_finite_stops_the_job_with_its_name(toy: Toy, quick: list[str]) -> None:
    plan = make_plan([str(toy())], ["ft"], overrides=[*quick, "first_lr=1e30"])
    store, key = Store("results"), next(iter(plan.jobs))
    words = r"step 0, training, epoch \d, iteration \d+: loss term 'ce' is (nan|inf)"
    with pytest.raises(TrainingError, match=words):
        train(plan, store, key)
    assert not store.done(key)


def test_what_stops_a_job_is_written_down(
    toy: Toy, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan([str(toy())], ["ft"], overrides=[*quick, "first_lr=1e30"])
    store, key = Store("results"), next(iter(plan.jobs))
    store.make()
    store.open_work(plan.record(key))
    with pytest.raises(TrainingError):
        run_job("results", key, "the log")
    failure = store.state(key).failure
    assert failure is not None
    assert "loss term 'ce' is" in failure.error
    assert failure.log == "the log"
    assert "error: step 0, training" in capsys.readouterr().err


def test_a_batch_without_a_labelled_pixel_is_named_as_the_cause(toy: Toy, quick: list[str]) -> None:
    plan = make_plan([str(toy())], ["mbs"], overrides=quick)

    def void(session: Session) -> None:
        session.data.train.table = np.full(256, 255, np.uint8)
        session.data.train.__post_init__()

    with pytest.raises(TrainingError, match=r"is nan .*the batch has no labelled pixel"):
        train(plan, Store("results"), next(iter(plan.jobs)), watch=void)


def test_an_overflow_in_half_precision_leaves_no_importance(
    toy: Toy, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = functools.partial(torch.amp.GradScaler, init_scale=2.0**120, backoff_factor=2.0**-60)
    monkeypatch.setattr(torch.amp, "GradScaler", eager)
    plan = make_plan([str(toy(then=2))], ["ewc", "rw", "pi"], overrides=[*quick, "precision=fp16"])
    store = Store("results")
    train_all(plan, store)
    for key in plan.jobs:
        left = read_tensors(store.artifact(key) / "state.safetensors")[0]
        assert left
        assert all(np.isfinite(value).all() for value in left.values())


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_every_precision_trains(toy: Toy, quick: list[str], precision: str) -> None:
    plan = make_plan([str(toy(then=2))], ["plop"], overrides=[*quick, f"precision={precision}"])
    store = Store("results")
    train_all(plan, store)
    assert all(store.done(key) for key in plan.jobs)
    weights = read_tensors(store.artifact(list(plan.jobs)[-1]) / "model.safetensors")[0]
    kinds = {value.dtype for value in weights.values() if value.is_floating_point()}
    assert kinds == {torch.float64 if precision == "fp64" else torch.float32}


def test_every_test_image_is_scored_whole_whatever_the_batch(toy: Toy, quick: list[str]) -> None:
    """Twelve images in batches of five: the last two count as well."""
    plan, store = make_plan([str(toy())], ["joint"], overrides=[*quick, "batch_size=5"]), Store("r")
    (key,) = plan.jobs
    train(plan, store, key)
    counts = read_counts(store.artifact(key) / "confusion.npz")
    pixels = np.bincount(counts.entries[:, 0], counts.values, len(counts.images))
    assert pixels.tolist() == [32 * 32] * 12
