"""Jobs that differ in what is recorded alone: one training serves all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Bench
from safetensors.numpy import load_file

from bench.errors import UserError
from bench.launch.choose import make_executor
from bench.launch.driver import Driver
from bench.launch.executor import Inline
from bench.launch.siblings import leaders, shared_training, under_way
from bench.launch.status import status_data
from bench.plan.make import make_plan
from bench.plan.plan import Job, Plan
from bench.store.cut import cut
from bench.store.results import Store

Toy = Callable[..., Path]


@dataclass
class World:
    """A toy benchmark whose step 0 can be recorded for EWC, PI and RW."""

    protocol: Path
    settings: Sequence[str]

    def plan(self, *methods: str) -> Plan:
        return make_plan([str(self.protocol)], methods, overrides=self.settings)

    def run(self, methods: str, store: Store, cluster: str = "inline", force: bool = False) -> Driver:
        plan = self.plan(*methods.split(","))
        driver = Driver(plan, store, make_executor(cluster, store), force=force)
        assert driver.run().ok, [store.state(key).failure for key in driver.outcome.failed]
        return driver


def first_key(plan: Plan, method: str) -> str:
    return next(chain.keys[0] for chain in plan.chains if chain.method.partition("[")[0] == method)


@pytest.fixture
def world(toy: Toy, quick: list[str]) -> World:
    return World(toy(then=2), quick)


def same_files(one: Store, other: Store, key: str, names: Sequence[str]) -> bool:
    return all((one.artifact(key) / n).read_bytes() == (other.artifact(key) / n).read_bytes() for n in names)


ALIKE = ("model.safetensors", "state.safetensors", "state.json", "train.jsonl", "job.json", "metrics.json")


def test_who_leads(world: World) -> None:
    plan = world.plan("ft", "ewc", "pi", "rw")
    keys = [first_key(plan, method) for method in ("ft", "ewc", "pi", "rw")]
    assert len(set(keys)) == 4
    leader, riders = shared_training(plan, keys[0], keys)
    most = max(len(plan.jobs[key].inputs.records) for key in keys)
    assert len(plan.jobs[leader].inputs.records) == most
    assert {leader, *riders} == set(keys)
    assert leaders(plan, plan.jobs) == dict.fromkeys([key for key in keys if key != leader], leader)


def test_one_training_serves_all_and_leaves_what_each_alone_would(
    world: World, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Store(in_tmp / "together")
    submitted: set[str] = set()
    submit = Inline.submit

    def noted(self: Inline, job: Job, parent: str | None) -> None:
        submitted.add(job.key)
        submit(self, job, parent)

    monkeypatch.setattr(Inline, "submit", noted)
    driver = world.run("ft,ewc,pi", together)
    keys = {method: first_key(driver.plan, method) for method in ("ft", "ewc", "pi")}
    assert len({driver.leader.get(key, key) for key in keys.values()}) == 1
    assert len(submitted & set(keys.values())) == 1  # the others had no process
    assert set(driver.outcome.done) == set(driver.plan.jobs)
    for method, key in keys.items():
        alone = Store(in_tmp / method)
        world.run(method, alone)
        assert same_files(together, alone, key, ("model.safetensors", "train.jsonl", "metrics.json")), method
        state, wanted = (load_file(s.artifact(key) / "state.safetensors") for s in (together, alone))
        assert state.keys() == wanted.keys(), method
        assert all((state[name] == wanted[name]).all() for name in state), method


def test_what_a_sibling_holds_is_cut_out_of_it(world: World, in_tmp: Path) -> None:
    alone, store = Store(in_tmp / "alone"), Store(in_tmp / "r")
    world.run("ft", alone)
    world.run("ewc", store)
    driver = world.run("ewc,ft", store)
    ft = first_key(driver.plan, "ft")
    assert ft in driver.outcome.done
    assert not (store.work(ft)).exists()
    assert os.path.samefile(
        *(store.artifact(key) / "train.jsonl" for key in (ft, first_key(driver.plan, "ewc")))
    )
    assert same_files(store, alone, ft, ALIKE[:4])
    assert store.metrics(ft) == alone.metrics(ft)
    record = store.artifact(ft) / "job.json"
    assert '"records": {}' in record.read_text()
    assert set(world.run("ewc,ft", store).outcome.already) == set(driver.plan.jobs)

    forced = world.run("ewc,ft", store, force=True)
    assert set(forced.outcome.done) == set(forced.plan.jobs)
    assert forced.leader == {ft: first_key(forced.plan, "ewc")}


def test_what_lacks_a_record_is_not_used(world: World, in_tmp: Path) -> None:
    store = Store(in_tmp / "r")
    world.run("ft", store)
    driver = world.run("ft,ewc", store)
    assert first_key(driver.plan, "ft") in driver.outcome.already
    ewc = first_key(driver.plan, "ewc")
    assert ewc in driver.outcome.done
    assert any(name.startswith("fisher.") for name in load_file(store.artifact(ewc) / "state.safetensors"))
    with pytest.raises(UserError, match="was not recorded for"):
        cut(store, first_key(driver.plan, "ft"), driver.plan.record(ewc))
    step_1 = driver.plan.chains[0].keys[1]
    with pytest.raises(UserError, match="not the same training as"):
        cut(store, ewc, driver.plan.record(step_1))


def test_a_rider_fails_with_its_leader_and_is_seen_from_elsewhere(command: Bench) -> None:
    methods = "brittle,recording"
    package = command.folder / "site"
    (package / "recording_method.py").write_text(RECORDING)
    (package / "recording_method.toml").write_text("")
    points = package / "brittle-1.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "recording = recording_method\n")
    (command.folder / "fail-0").touch()
    status, _, error = command("run", *command.plan(methods))
    assert status == 1
    assert "was trained with" in error
    assert list(command.status().values()) == ["failed", "waiting", "failed", "waiting"]
    status, _, error = command("run", *command.plan(methods), "--keep-failed")
    assert status == 1
    assert len(command.begun()) == 1

    (command.folder / "fail-0").unlink()
    hold = command.hold(0)
    driver = command.start("run", *command.plan(methods))
    leader = command.held(0, "recording")
    rider = command.keys("brittle")[0]
    assert under_way(command.store) == {rider: leader}
    rows = {row.key: row for row in status_data(command.store)}
    assert (rows[rider].state, rows[rider].leader) == ("running", leader)
    driver.kill()
    driver.communicate()
    pid = command.pid(leader)

    alone = command.start("run", *command.plan("brittle"))  # its plan does not know the leader
    assert alone.stderr is not None
    assert alone.stderr.readline().split()[0] == "adopted"
    hold.unlink()
    status, _, error = command.finish(alone)
    assert status == 0, error
    command.gone(pid)
    assert command("run", *command.plan(methods))[0] == 0
    assert [line.split()[:2] for line in command.begun() if line.startswith("0")] == [["0", "0"]] * 2 + [
        ["0", "1"]
    ]


RECORDING = '''
import torch
from bench.method import Recorder, Regularised


class Counted(Recorder):
    name = "counted"
    kinds = ("n",)

    def begin(self, parameters, previous):
        self.fill("n", {name: torch.zeros_like(p) for name, p in parameters.items()})

    def update(self, gradients, parameters):
        for n in self.listed("n", gradients):
            n += 1

    def finish(self, parameters):
        pass


class Recording(Regularised):
    """A penalty by how often a parameter was seen."""

    title = "Recording"
    first_step = "brittle"
    recorders = (Counted,)

    @classmethod
    def importance_of(cls, previous, normalise=True):
        return Counted.saved("n", previous)
'''.replace("import torch\n", "from bench.lazy import torch\n")


def test_on_a_queue_children_of_a_rider_wait_for_its_leader(world: World, in_tmp: Path) -> None:
    """Without a cluster: an executor that queues, and writes down what it was given."""
    from bench.launch.executor import Executor

    given: dict[str, str | None] = {}

    class Queue(Executor):
        queues, slots = True, 100

        def submit(self, job: Job, parent: str | None) -> None:
            given[job.key] = parent

        def takes_after(self, parent: str) -> bool:
            return parent in given

    store = Store(in_tmp / "r")
    plan = world.plan("ft", "ewc")
    driver = Driver(plan, store, Queue(store))
    driver.detach()
    ft, ewc = (next(c.keys for c in plan.chains if c.method.startswith(m)) for m in ("ft", "ewc"))
    assert given == {ewc[0]: None, ewc[1]: ewc[0], ft[1]: ewc[0]}
    assert [record.key for record in store.record(ewc[0]).also] == [ft[0]]


def test_the_plan_says_who_rides(world: World, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import cli

    words = ["--protocol", str(world.protocol), "--methods", "ft,ewc"]
    words += [word for item in world.settings for word in ("--set", item)]
    assert cli.main(["plan", *words]) == 0
    out = capsys.readouterr().out
    plan = world.plan("ft", "ewc")
    ft, ewc = first_key(plan, "ft"), first_key(plan, "ewc")
    line = next(line for line in out.splitlines() if line.startswith(ft))
    assert line.endswith(f"with {ewc}")
    assert next(line for line in out.splitlines() if line.startswith(ewc)).endswith("records fisher")
    assert "4 jobs for 4 steps of 2 chains; 0 done, 3 to train (1 come with them or with what is done)" in out
    world.run("ewc", Store(in_tmp / "results"))
    assert cli.main(["plan", *words]) == 0
    assert f"cut out of {ewc}" in capsys.readouterr().out
