"""What a step needs of the step before it, and what is refused in its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import train

from bench.errors import UserError
from bench.files import read_json
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.store.results import Store
from bench.train.session import open_job
from bench.train.tensors import read_tensors, write_tensors

Toy = Callable[..., Path]


@pytest.fixture
def finished_first_step(toy: Toy, quick: list[str]) -> tuple[Store, Plan]:
    plan = make_plan([str(toy(then=2))], ["mib"], overrides=quick)
    store = Store("results")
    train(plan, store, next(iter(plan.jobs)))
    return store, plan


def test_a_parent_that_is_not_there(finished_first_step: tuple[Store, Plan]) -> None:
    store, plan = finished_first_step
    first, second = plan.jobs
    (store.artifact(first) / "job.json").unlink()
    with pytest.raises(UserError, match=f"{first}: the previous step is not there; run bench run again"):
        train(plan, store, second)


def test_a_parent_that_is_cut_off(finished_first_step: tuple[Store, Plan]) -> None:
    store, plan = finished_first_step
    first, second = plan.jobs
    path = store.artifact(first) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cut off or damaged"):
        train(plan, store, second)


def test_a_parent_of_another_class_count(finished_first_step: tuple[Store, Plan]) -> None:
    store, plan = finished_first_step
    first, second = plan.jobs
    path = store.artifact(first) / "model.safetensors"
    weights, _ = read_tensors(path)
    weights["classifier.heads.0.weight"] = torch.zeros(9, *weights["classifier.heads.0.weight"].shape[1:])
    write_tensors(path, weights)
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit this network"):
        train(plan, store, second)


@pytest.mark.parametrize("what", ["classes", "method", "seed"])
def test_a_parent_of_another_protocol_or_method(finished_first_step: tuple[Store, Plan], what: str) -> None:
    store, plan = finished_first_step
    first, second = plan.jobs
    path = store.artifact(first) / "job.json"
    job = read_json(path)
    assert isinstance(job, dict)
    inputs = job["inputs"]
    assert isinstance(inputs, dict)
    inputs[what] = {
        "classes": [[2, 1]],
        "method": {"name": "lwf", "version": [1], "settings": {}},
        "seed": 5,
    }[what]  # type: ignore[assignment]
    path.write_text(json.dumps(job))
    with pytest.raises(UserError, match="another method, protocol or class order"):
        train(plan, store, second)


def test_data_that_changed_since_planning_is_refused(
    finished_first_step: tuple[Store, Plan], in_tmp: Path
) -> None:
    store, plan = finished_first_step
    image = in_tmp / "toy/images/train000.png"
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(
        UserError, match=r"\(train\) is not the one that was planned with; run bench run again"
    ):
        train(plan, store, list(plan.jobs)[1])


def test_a_step_0_without_importances_is_never_used_silently(toy: Toy, quick: list[str]) -> None:
    plan = make_plan([str(toy(then=2))], ["ewc"], overrides=quick)
    store = Store("results")
    first, second = plan.jobs
    train(plan, store, first)
    write_tensors(store.artifact(first) / "state.safetensors", {})
    with pytest.raises(UserError, match="trained without recording 'fisher'; train it again with --force"):
        train(plan, store, second)


def test_a_parent_that_learned_other_classes(
    finished_first_step: tuple[Store, Plan], in_tmp: Path, quick: list[str]
) -> None:
    """A whole result, found under its own key, but of another class order."""
    store, plan = finished_first_step
    other = in_tmp / "other.toml"
    other.write_text('dataset = "toy-set.toml"\nsteps = [[2, 1], [3, 4]]\n')
    first = next(iter(make_plan([str(other)], ["mib"], overrides=quick).jobs))
    train(make_plan([str(other)], ["mib"], overrides=quick), store, first)
    record = plan.record(list(plan.jobs)[1])
    inputs = record.inputs.model_copy(update={"parent": first})
    store.open_work(record)
    with pytest.raises(UserError, match="another method, protocol or class order"):
        open_job(record.model_copy(update={"inputs": inputs}), store)
