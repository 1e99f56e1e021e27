"""Several processes that train one step together, here over gloo on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT

from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.score.counts import read_counts
from bench.store.results import Store
from bench.train.tensors import read_tensors

RUN = "import sys; from bench.train.job import run_job; [run_job(sys.argv[1], key) for key in sys.argv[2:]]"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def train(plan: Plan, store: Store, keys: Sequence[str], world: int) -> list[tuple[int, str]]:
    """Run jobs one after the other on `world` processes, as torchrun would start them.

    Returns:
        Exit status and errors of each process.
    """
    store.make()
    for key in keys:
        store.open_work(plan.record(key))
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", RUN, str(store.root), *keys]
    processes = [
        subprocess.Popen(
            command,
            env={**common, **group, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    return [(process.returncode, error) for process in processes for _, error in [process.communicate()]]


@pytest.mark.parametrize("method", ["mib", "plop"])
def test_two_processes_train_as_one_does_and_a_batch_that_does_not_divide_is_refused(
    toy: Callable[..., Path], method: str
) -> None:
    """The second step: a network with a teacher, two loss terms, and PLOP's thresholds.

    The learning rate is small because rounding errors grow.
    """
    protocol, common = str(toy(then=2)), ["epochs=2", "first_epochs=2", "crop=32", "lr=0.001"]
    plan, odd = (make_plan([protocol], [method], overrides=[*common, f"batch_size={n}"]) for n in (4, 3))
    one, two = Store("one"), Store("two")
    first, second = plan.jobs
    refused = next(iter(odd.jobs))
    both = replace(plan, jobs={**plan.jobs, **odd.jobs})
    assert train(plan, one, [first, second], 1) == [(0, "")]
    shutil.copytree(one.artifact(first), two.artifact(first))
    assert [status for status, _ in train(both, two, [second, refused], 2)] == [1, 1]
    failure = two.state(refused).failure
    assert failure is not None
    assert failure.error == "batch_size = 3 is the size over all processes and does not divide by 2 processes"

    assert two.state(second).state == "done"
    logs = [
        [json.loads(line) for line in (store.artifact(second) / "train.jsonl").read_text().splitlines()]
        for store in (one, two)
    ]
    assert len(logs[0]) == plan.jobs[second].iterations
    for single, double in zip(*logs, strict=True):
        assert single.pop("phase") == double.pop("phase")
        assert single == pytest.approx(double, rel=1e-4)
    weights = [read_tensors(store.artifact(second) / "model.safetensors")[0] for store in (one, two)]
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], rtol=1e-3, atol=1e-5, err_msg=name)
    counts = [read_counts(store.artifact(second) / "confusion.npz") for store in (one, two)]
    assert counts[0].images == counts[1].images
    assert counts[0].total().sum() == counts[1].total().sum()
    assert json.loads((two.artifact(second) / "environment.json").read_text())["processes"] == 2


APART = """
import math, sys
from bench import distributed
from bench.store.results import Store
from bench.train.session import open_job

store, dies = Store(sys.argv[1]), sys.argv[3] == "dies"
rank, _ = distributed.start()
with open_job(store.record(sys.argv[2]), store) as session:
    trainer = session.trainer
    trainer.log_every = 3  # as on a GPU: losses are exchanged now and then
    if dies:
        trainer.checkpoint_seconds = 0 if rank else math.inf  # the second process alone wants one
        save = trainer.on_checkpoint

        def on_checkpoint(place):
            save(place)
            print(rank, *place, flush=True)
            distributed.barrier()
            sys.exit(9)

        trainer.on_checkpoint = on_checkpoint
    session.train()
    if not rank:
        from bench.train.tensors import write_tensors

        write_tensors(store.root / "end.safetensors", session.method.network.state_dict())
"""


def test_processes_write_a_checkpoint_together_and_each_goes_on_drawing_where_it_stood(
    toy: Callable[..., Path], quick: list[str]
) -> None:
    """EIR's processes paste by generators of their own."""
    protocol = str(toy(images=24, then=2))
    plan = make_plan([protocol], ["eir"], overrides=[*quick, "first_epochs=1", "epochs=2"])
    first, second = plan.jobs
    whole, broken = Store("whole"), Store("broken")
    assert train(plan, whole, [first], 1) == [(0, "")]
    shutil.copytree(whole.artifact(first), broken.artifact(first))
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def both(store: Store, how: str) -> list[tuple[int, str]]:
        store.make()
        store.open_work(plan.record(second))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-c", APART, str(store.root), second, how]
        processes = [
            subprocess.Popen(
                command, env={**common, **group, "RANK": str(r)}, stdout=subprocess.PIPE, text=True
            )
            for r in range(2)
        ]
        outs = [process.communicate(timeout=120)[0] for process in processes]
        return [(process.returncode, out) for process, out in zip(processes, outs, strict=True)]

    assert [status for status, _ in both(whole, "ends")] == [0, 0]
    died = both(broken, "dies")
    assert [out for _, out in died] == ["0 0 0 3\n", "1 0 0 3\n"]
    assert all(status for status, _ in died)  # 9, or that of a process whose peer was gone before it
    ended = both(broken, "ends")
    assert [status for status, _ in ended] == [0, 0]
    assert all("0 epochs and 3 batches done" in out for _, out in ended)
    assert (whole.root / "end.safetensors").read_bytes() == (broken.root / "end.safetensors").read_bytes()
