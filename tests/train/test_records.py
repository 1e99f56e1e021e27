"""Records: what a step leaves for who needs it, on the side of a training that they do not touch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import EXACT, interrupted, train, train_all
from torch import Tensor

from bench.errors import UserError
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.store.cut import cut
from bench.store.records import JobRecord, Metrics, read_record
from bench.store.results import Store
from bench.train.job import do, run_job
from bench.train.session import open_job, wanted_records
from bench.train.tensors import read_tensors

Toy = Callable[..., Path]
PLAIN = ("model.safetensors", "confusion.npz", "train.jsonl")
"""What does not depend on what is recorded."""
KINDS = {"ft": set(), "ewc": {"fisher"}, "pi": {"path"}, "rw": {"walk", "fisher"}}


def plan_of(toy: Toy, quick: list[str], methods: list[str], *more: str) -> Plan:
    return make_plan([str(toy(then=2))], methods, overrides=[*quick, *more])


def firsts(plan: Plan) -> dict[str, str]:
    """Key of step 0 by method."""
    return {chain.method.partition("[")[0]: chain.keys[0] for chain in plan.chains}


def state(store: Store, key: str) -> dict[str, Tensor]:
    return read_tensors(store.artifact(key) / "state.safetensors")[0]


def recorders(store: Store, key: str) -> set[str]:
    return {name.partition(".")[0] for name in state(store, key)}


def bytes_of(store: Store, key: str, names: tuple[str, ...] = EXACT) -> dict[str, bytes]:
    return {name: (store.artifact(key) / name).read_bytes() for name in names}


# ---- in the plan -------------------------------------------------------------------------------------------


def test_siblings_differ_in_their_records_alone_and_are_served_together(toy: Toy, quick: list[str]) -> None:
    plan = plan_of(toy, quick, ["ft", "ewc", "pi", "rw", "mib"])
    first = firsts(plan)
    assert first["mib"] == first["ft"]
    assert len({first[name] for name in KINDS}) == 4
    every = [first[name] for name in KINDS]
    for name, kinds in KINDS.items():
        assert set(plan.jobs[first[name]].inputs.records) == kinds
        assert set(plan.siblings(first[name])) == set(every)
        assert set(plan.served_together(first[name], every)) == set(every) - {first[name]}
        assert plan.served_together(first[name], [first["pi"]]) == ([first["pi"]] if name != "pi" else [])
        holds = {other for other in KINDS if plan.yields(first[name], first[other])}
        assert holds == {other for other in KINDS if KINDS[other] <= kinds}
    for chain in plan.chains:  # later steps have their own method's records, and no siblings
        assert plan.siblings(chain.keys[1]) == [chain.keys[1]]
        assert plan.jobs[chain.keys[1]].inputs.records == {}


def test_records_that_contradict_each_other_are_not_served_together(toy: Toy, quick: list[str]) -> None:
    plan = plan_of(toy, quick, ["ft", "ewc", "rw"], "rw.fisher_alpha=0.5")
    first = firsts(plan)
    every = list(first.values())
    assert plan.served_together(first["ewc"], every) == [first["ft"]]
    assert plan.served_together(first["rw"], every) == [first["ft"]]
    one = plan.served_together(first["ft"], every)  # one of the two, not both
    assert one == [first["ewc"]]
    assert not plan.yields(first["rw"], first["ewc"])
    assert plan.yields(first["rw"], first["ft"])
    assert not plan.yields(plan.chains[0].keys[1], first["ft"])


# ---- in the training ---------------------------------------------------------------------------------------


def test_recording_touches_no_bit_of_the_training(toy: Toy, quick: list[str]) -> None:
    plan = plan_of(toy, quick, list(KINDS))
    store = Store("r")
    first = firsts(plan)
    for key in first.values():
        train(plan, store, key)
    for name, kinds in KINDS.items():
        assert bytes_of(store, first[name], PLAIN) == bytes_of(store, first["ft"], PLAIN), name
        assert recorders(store, first[name]) == kinds
    assert state(store, first["ft"]) == {}
    parameters = set(read_tensors(store.artifact(first["ft"]) / "model.safetensors")[0])
    fisher = {name.removeprefix("fisher.running.") for name in state(store, first["ewc"])}
    assert fisher <= parameters
    assert "classifier.heads.0.weight" in fisher


def test_one_training_publishes_every_sibling_with_its_own_records_alone(toy: Toy, quick: list[str]) -> None:
    plan = plan_of(toy, quick, list(KINDS))
    together, apart = Store("together"), Store("apart")
    first = firsts(plan)
    train(plan, together, first["rw"], [first[name] for name in ("ft", "ewc", "pi")])
    for key in first.values():
        train(plan, apart, key)
    for name, key in first.items():
        assert together.done(key)
        assert recorders(together, key) == KINDS[name]
        assert bytes_of(together, key) == bytes_of(apart, key), name
        told = read_record(together.artifact(key) / JobRecord.file, JobRecord)
        assert told == plan.record(key)
        metrics = read_record(together.artifact(key) / Metrics.file, Metrics)
        assert metrics is not None
        assert metrics.key == key


@pytest.mark.parametrize("leader", ["ft", "ewc", "pi", "rw"])
def test_whoever_leads_the_siblings_get_the_same(toy: Toy, quick: list[str], leader: str) -> None:
    """The walk reads the Fisher information as it was before the iteration, whoever asks for it first."""
    plan = plan_of(toy, quick, list(KINDS), "rw.walk_interval=1")
    together, apart = Store("together"), Store("apart")
    first = firsts(plan)
    train(plan, together, first[leader], [key for name, key in first.items() if name != leader])
    train(plan, apart, first["rw"])
    assert bytes_of(together, first["rw"]) == bytes_of(apart, first["rw"])


def test_an_artifact_cut_out_of_a_joint_training_is_that_of_a_training_of_its_own(
    toy: Toy, quick: list[str]
) -> None:
    plan = plan_of(toy, quick, list(KINDS))
    joint, alone = Store("joint"), Store("alone")
    first = firsts(plan)
    train(plan, joint, first["rw"])
    for name in ("ewc", "ft"):
        train(plan, alone, first[name])
        cut(joint, first["rw"], plan.record(first[name]))
        assert bytes_of(joint, first[name]) == bytes_of(alone, first[name]), name
        names = [{p.name for p in store.artifact(first[name]).iterdir()} for store in (joint, alone)]
        assert names[0] == names[1]
        values = [(store.artifact(first[name]) / "state.json").read_text() for store in (joint, alone)]
        assert values[0] == values[1]
    with pytest.raises(UserError, match=f"was not recorded for {first['pi']}; train it again with --force"):
        cut(joint, first["rw"], plan.record(first["pi"]))
    assert not joint.done(first["pi"])
    with pytest.raises(UserError, match="not the same training as"):
        cut(joint, first["rw"], plan.record(plan.chains[0].keys[1]))


def test_later_steps_go_on_from_a_cut_artifact_as_from_their_own(toy: Toy, quick: list[str]) -> None:
    plan = plan_of(toy, quick, ["ewc", "rw"])
    joint, alone = Store("joint"), Store("alone")
    first, second = plan.chains[0].keys
    train(plan, joint, firsts(plan)["rw"], [first])
    for store in (joint, alone):
        if not store.done(first):
            train(plan, store, first)
        train(plan, store, second)
    assert bytes_of(joint, second) == bytes_of(alone, second)


def test_rw_and_ewc_share_one_fisher(toy: Toy, quick: list[str]) -> None:
    plan = plan_of(toy, quick, ["ewc", "rw"])
    store = Store("r")
    first = firsts(plan)
    for key in first.values():
        train(plan, store, key)
    ewc, rw = (state(store, first[name]) for name in ("ewc", "rw"))
    assert {name for name in rw if name.startswith("fisher.")} == set(ewc)
    assert all(value.equal(rw[name]) for name, value in ewc.items())
    record = plan.record(first["rw"], [first["ewc"]])
    assert list(wanted_records(record)) == ["walk", "fisher"]  # the walk is updated first
    store.open_work(record)
    with open_job(record, store) as session:
        assert len(session.method.recorded_by) == 2  # type: ignore[attr-defined]


def test_importances_are_recorded_at_step_0_and_handed_on(toy: Toy, quick: list[str]) -> None:
    plan = plan_of(toy, quick, ["ewc", "rw", "pi"])
    store = Store("r")
    train_all(plan, store)
    for chain in plan.chains:
        name = chain.method.partition("[")[0]
        last = chain.keys[-1]
        assert recorders(store, last) == KINDS[name]
        kind = {"pi": "path.score", "ewc": "fisher.running", "rw": "walk.score"}[name]
        assert f"{kind}.classifier.heads.1.weight" in state(store, last)


# ---- interrupted -------------------------------------------------------------------------------------------


def test_a_checkpoint_recorded_for_less_begins_anew(
    toy: Toy, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(toy, quick, ["ewc", "rw"])
    store, whole = Store("r"), Store("whole")
    first = firsts(plan)
    with pytest.raises(KeyboardInterrupt):
        train(plan, store, first["ewc"], watch=interrupted(1))
    train(plan, store, first["ewc"], [first["rw"]])
    assert "recorded for other methods; the step begins anew" in capsys.readouterr().out
    train(plan, whole, first["rw"])
    assert bytes_of(store, first["rw"]) == bytes_of(whole, first["rw"])


def test_an_interrupted_joint_training_ends_with_the_same_bits(
    toy: Toy, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(toy, quick, list(KINDS))
    store, whole = Store("r"), Store("whole")
    first = firsts(plan)
    also = [first[name] for name in ("ft", "ewc", "pi")]
    with pytest.raises(KeyboardInterrupt):
        train(plan, store, first["rw"], also, watch=interrupted(1))
    do(store.record(first["rw"]), store)
    assert "resuming" in capsys.readouterr().out
    train(plan, whole, first["rw"], also)
    for key in first.values():
        assert bytes_of(store, key) == bytes_of(whole, key)


def test_the_entry_point_of_a_process_publishes_siblings_too(toy: Toy, quick: list[str]) -> None:
    plan = plan_of(toy, quick, ["ft", "ewc"])
    store, first = Store("r"), firsts(plan)
    store.make()
    store.open_work(plan.record(first["ewc"], [first["ft"]]))
    run_job("r", first["ewc"])
    assert store.done(first["ewc"])
    assert store.done(first["ft"])
