"""An evaluation is a job like others: its record, its key, what it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jobs import train, train_all
from torch import Tensor, nn

from bench.errors import UserError
from bench.method import Batch, Method
from bench.plan.keys import key_of
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.score.counts import Counts, read_counts
from bench.store.records import EvaluationInputs, JobRecord, read_record
from bench.store.results import Store
from bench.testing.plugins import Offers
from bench.train.job import do, run_job
from bench.train.session import open_job

Toy = Callable[..., Path]


def evaluate(plan: Plan, store: Store, evaluation: EvaluationInputs, last_only: bool = True) -> list[str]:
    """Run the evaluations of a plan; their keys."""
    whole = plan.evaluated(evaluation, last_only)
    keys = [key for key in whole.jobs if key not in plan.jobs]
    for key in keys:
        store.open_work(whole.record(key))
        do(store.record(key), store)
        store.clear_work(key)
    return keys


def counts(store: Store, key: str) -> Counts:
    return read_counts(store.artifact(key) / "confusion.npz")


def same(a: Counts, b: Counts) -> bool:
    return (
        (a.images, a.rows, a.n_classes) == (b.images, b.rows, b.n_classes)
        and np.array_equal(a.total(), b.total())
        and np.array_equal(a.shows_seen, b.shows_seen)
    )


class Rotated(Method):
    """Fine-tuning whose prediction needs a module of its own."""

    def own_modules(self) -> dict[str, nn.Module]:
        return {"turn": nn.BatchNorm1d(1)}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        self.modules["turn"](batch.labels.double().mean((1, 2))[:, None].float())  # its statistics decide
        return super().losses(batch)

    def predict(self, output: object, size: tuple[int, int]) -> Tensor:
        classes = super().predict(output, size)
        mean = self.modules["turn"].running_mean
        assert isinstance(mean, Tensor)
        return classes.where(mean > 0.01, 1)  # a module that is fresh would say 1 everywhere


@pytest.mark.parametrize("method", ["mib", "ssul", "dkd", "nest+plop", "ewc", "joint", "rotated"])
def test_the_usual_evaluation_finds_what_the_training_found(
    toy: Toy, quick: list[str], offer: Offers, method: str
) -> None:
    offer("rotated", Rotated)
    plan, store = make_plan([str(toy(then=2))], [method], overrides=quick), Store("r")
    train_all(plan, store)
    found = evaluate(plan, store, EvaluationInputs(), last_only=False)
    assert len(found) == len(plan.jobs)
    for of, key in zip(plan.jobs, found, strict=True):
        assert same(counts(store, of), counts(store, key))
        one, two = store.metrics(of), store.metrics(key)
        assert one is not None
        assert two is not None
        assert (one.scores, one.classes, two.key) == (two.scores, two.classes, key)
        assert not (store.artifact(key) / "model.safetensors").exists()
        told = read_record(store.artifact(key) / JobRecord.file, JobRecord)
        assert told is not None
        assert (told.inputs.kind, told.inputs.parent, key_of(told.inputs)) == ("evaluate", of, key)


def test_another_split_or_crop_is_another_key_and_other_counts(toy: Toy, quick: list[str]) -> None:
    plan, store = make_plan([str(toy(then=2))], ["mib"], overrides=quick), Store("r")
    train_all(plan, store)
    keys = {}
    for name, evaluation in {
        "usual": EvaluationInputs(),
        "training images": EvaluationInputs(split="train"),
        "crop": EvaluationInputs(crop=16),
    }.items():
        (keys[name],) = evaluate(plan, store, evaluation)
    assert len(set(keys.values())) == 3
    found = {name: counts(store, key) for name, key in keys.items()}
    assert len(found["usual"].images) == 12
    assert len(found["training images"].images) == 24
    assert found["training images"].images[0] == "train000"
    assert found["training images"].total().sum() == 24 * 32 * 32
    assert found["crop"].images == found["usual"].images
    assert found["crop"].total().sum() == 12 * 16 * 16


def test_evaluations_stand_in_the_plan_below_what_they_test(toy: Toy, quick: list[str]) -> None:
    plan = make_plan([str(toy(then=2))], ["ft", "mib", "ewc"], overrides=quick)
    last = plan.evaluated(EvaluationInputs())
    every = plan.evaluated(EvaluationInputs(), last_only=False)
    assert len(last.jobs) == len(plan.jobs) + 3
    assert len(every.jobs) == 2 * len(plan.jobs)  # a shared step is tested once
    for key in set(every.jobs) - set(plan.jobs):
        job = every.jobs[key]
        assert job.parent in plan.jobs
        assert key in every.descendants({str(job.parent)})
        assert key_of(job.inputs) == key
        assert every.record(key).inputs == job.inputs
        assert (job.iterations, job.inputs.records, job.inputs.training) == (0, {}, {})
        assert every.siblings(key) == [key]


def test_an_evaluation_without_its_step_is_refused(toy: Toy, quick: list[str]) -> None:
    plan, store = make_plan([str(toy(then=2))], ["ft"], overrides=quick), Store("r")
    store.make()
    whole = plan.evaluated(EvaluationInputs())
    key = list(whole.jobs)[-1]
    with pytest.raises(UserError, match="the previous step is not there; run bench run again"):
        open_job(whole.record(key), store)


def test_an_evaluation_runs_in_a_process_of_its_own(toy: Toy, quick: list[str]) -> None:
    plan, store = make_plan([str(toy(first=4))], ["ft"], overrides=quick), Store("r")
    (of,) = plan.jobs
    train(plan, store, of)
    whole = plan.evaluated(EvaluationInputs())
    key = list(whole.jobs)[-1]
    store.open_work(whole.record(key))
    run_job("r", key)
    assert same(counts(store, of), counts(store, key))
    assert not store.work(key).exists()
