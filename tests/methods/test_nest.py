"""NeST around other methods: what it replaces, what it leaves alone, and that it can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import files, interrupted, train, train_all
from torch import Tensor

from bench.method.interface import Phase
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.store.results import Store
from bench.train.session import Session
from bench.train.tensors import read_tensors

Toy = Callable[..., Path]
Weights = dict[str, Tensor]
SETTINGS = ("epochs=2", "first_epochs=1", "batch_size=4", "crop=32")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


class Watched:
    """Keeps what a job goes through.

    Attributes:
        seen: by phase name the weights that it starts from and ends with.
        scores: by phase name the best score on test images after it.
        begun: the method's state when the step began.
    """

    def __init__(self) -> None:
        self.seen: dict[str, tuple[Weights, Weights]] = {}
        self.scores: dict[str, float] = {}
        self.begun: Weights = {}

    def __call__(self, session: Session) -> None:
        plain, begin = session.trainer.run, session.begin

        def weights() -> Weights:
            return {name: value.clone() for name, value in session.method.network.state_dict().items()}

        def run(index: int, phase: Phase, *more: Any, **named: Any) -> None:
            before = weights()
            plain(index, phase, *more, **named)
            self.seen[phase.name] = before, weights()
            self.scores[phase.name] = session.best.score if session.best else -1.0

        def watched_begin() -> None:
            begin()
            self.begun = {k: v.clone() for k, v in session.method.state.items() if isinstance(v, Tensor)}

        session.trainer.run, session.begin = run, watched_begin  # type: ignore[method-assign]


def plan_of(protocol: Path, name: str, more: Sequence[str] = ()) -> Plan:
    """Two pre-tuning epochs and two of the wrapped method, on a toy data set in two steps."""
    return make_plan([str(protocol)], [name], overrides=[*SETTINGS, "pretuning_epochs=2", *more])


def run_last(plan: Plan, store: Store) -> Watched:
    """All jobs of a plan in this process, the last one watched."""
    watched = Watched()
    train_all(plan, store, watched)
    return watched


def log(store: Store, key: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store.artifact(key) / "train.jsonl").read_text().splitlines()]


# ---- what it does to a step --------------------------------------------------------------------------------


def test_pretuning_writes_the_new_rows_and_the_background_row_and_nothing_else(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+mib")
    job = run_last(plan, Store("r"))
    before, after = job.seen["pre-tuning"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in moved if "running" in name}
    assert moved - statistics == {
        "classifier.heads.0.weight",
        "classifier.heads.1.weight",
        "classifier.heads.1.bias",
    }
    assert statistics  # the body is frozen in weights only
    assert torch.equal(before["classifier.heads.0.weight"][1:], after["classifier.heads.0.weight"][1:])
    assert torch.equal(
        after["classifier.heads.0.weight"], job.seen["training"][0]["classifier.heads.0.weight"]
    )


def test_the_log_shows_both_phases_and_the_last_update_of_pretuning_is_void(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+mib", ["nest+mib.pretuning_lr_scale=3.0"])
    store = Store("r")
    run_last(plan, store)
    lines = log(store, list(plan.jobs)[-1])
    pretuning = [line for line in lines if line["phase"] == "pre-tuning"]
    main = [line for line in lines if line["phase"] == "training"]
    assert lines == pretuning + main
    assert len(pretuning) == len(main) > 2
    assert set(pretuning[0]) == {"phase", "epoch", "iteration", "lr", "ce"}
    assert set(main[0]) == {"phase", "epoch", "iteration", "lr", "ce", "kd"}
    lr = plan.jobs[list(plan.jobs)[-1]].config.lr
    total = len(pretuning)
    assert [line["lr"] for line in pretuning] == pytest.approx(
        [3 * lr * (1 - k / total) ** 0.9 for k in range(1, total + 1)]
    )
    assert pretuning[-1]["lr"] == 0
    assert main[0]["lr"] == lr


def test_the_transformation_leaves_no_trace_in_the_artifact(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+plop")
    store = Store("r")
    run_last(plan, store)
    tensors, _ = read_tensors(store.artifact(list(plan.jobs)[-1]) / "state.safetensors")
    assert set(tensors) == {"thresholds"}


@pytest.mark.parametrize("frozen", [True, False])
def test_old_heads_can_be_frozen_while_the_wrapped_method_trains(toy: Toy, frozen: bool) -> None:
    plan = plan_of(toy(then=2), "nest+plop", [f"freeze_old_classifier={str(frozen).lower()}"])
    job = run_last(plan, Store("r"))
    before, after = job.seen["training"]
    for name in ("classifier.heads.0.weight", "classifier.heads.0.bias"):
        assert torch.equal(before[name], after[name]) is frozen
    assert not torch.equal(before["classifier.heads.1.weight"], after["classifier.heads.1.weight"])
    first_conv = next(name for name in before if name.startswith("body."))
    assert not torch.equal(before[first_conv], after[first_conv])


def test_a_regulariser_neither_sees_nor_holds_the_pretuning(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+ewc")
    store = Store("r")
    run_last(plan, store)
    terms = {
        line["phase"]: set(line) - {"phase", "epoch", "iteration", "lr"}
        for line in log(store, list(plan.jobs)[-1])
    }
    assert terms == {"pre-tuning": {"ce"}, "training": {"ce", "penalty"}}


def test_one_random_bias_for_all_new_classes_or_the_one_that_is_asked_for(toy: Toy) -> None:
    protocol, store = toy(then=2), Store("r")
    drawn = run_last(plan_of(protocol, "nest+ft"), store).begun
    given = run_last(plan_of(protocol, "nest+ft", ["beta_init=0.25"]), store).begun
    beta = drawn["nest.new_bias"]
    assert beta.tolist() == [beta[0].item()] * 2
    assert 0 < beta[0].abs() < 1 / 64**0.5
    assert given["nest.new_bias"].tolist() == [0.25, 0.25]
    assert torch.equal(drawn["nest.importance"], given["nest.importance"])
    assert drawn["nest.importance"].shape == (2, 3, 64)
    assert drawn["nest.mixing"].sum(1).tolist() == pytest.approx([1, 1])
    assert drawn["nest.background_importance"].eq(1).all()
    assert drawn["nest.background_mixing"].tolist() == [[1]]


def test_without_epochs_only_the_similarity_initialises(toy: Toy) -> None:
    job = run_last(plan_of(toy(then=2), "nest+mib", ["pretuning_epochs=0"]), Store("r"))
    before, after = job.seen["pre-tuning"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= {"classifier.heads.0.weight", "classifier.heads.1.weight", "classifier.heads.1.bias"}
    assert torch.allclose(before["classifier.heads.0.weight"], after["classifier.heads.0.weight"], atol=1e-6)


def test_selection_considers_the_main_phase_only(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.method.interface.LEAST_INTERVAL", 1)
    job = run_last(plan_of(toy(then=2), "nest+mib", ["selection=best-on-test"]), Store("r"))
    assert job.scores["pre-tuning"] < 0 <= job.scores["training"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_runs_in_half_precision(toy: Toy, precision: str) -> None:
    plan = plan_of(toy(then=2), "nest+plop", [f"precision={precision}"])
    job = run_last(plan, Store("r"))
    before, after = job.seen["pre-tuning"]
    assert not torch.equal(before["classifier.heads.1.weight"], after["classifier.heads.1.weight"])


@pytest.mark.parametrize("name", ["nest+ft", "nest+lwf", "nest+lwf-mc", "nest+ilt", "nest+rw", "nest+pi"])
def test_it_wraps_whatever_has_a_linear_classifier(toy: Toy, name: str) -> None:
    plan = plan_of(toy(then=1), name, ["pretuning_epochs=1", "epochs=1"])
    store = Store("r")
    run_last(plan, store)
    assert all(store.done(key) for key in plan.jobs)
    assert len(plan.jobs) == 3


def test_it_runs_on_a_swin_body(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+plop", ['network="small-swin"'])
    job = run_last(plan, Store("r"))
    before, after = job.seen["pre-tuning"]  # no statistics in layer norms: the body stays as it is
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("body."))


# ---- interruptions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "where"),
    [(1, "phase 0, 1 epochs"), (2, "phase 0, 2 epochs"), (3, "phase 1, 1 epochs")],
    ids=["pre-tuning", "between", "training"],
)
@pytest.mark.parametrize("name", ["nest+mib", "nest+plop", "nest+ewc"])
def test_an_interrupted_step_ends_with_the_same_bits(
    toy: Toy, in_tmp: Path, capsys: pytest.CaptureFixture[str], name: str, epochs: int, where: str
) -> None:
    plan = plan_of(toy(then=2), name, ["freeze_old_classifier=true"] if name == "nest+plop" else [])
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    run_last(plan, whole)
    with pytest.raises(KeyboardInterrupt):
        train_all(plan, broken, interrupted(epochs))
    last = list(plan.jobs)[-1]
    assert not broken.done(last)
    train(plan, broken, last)
    assert f"resuming {last}: {where} done" in capsys.readouterr().out
    assert files(whole, plan) == files(broken, plan)
