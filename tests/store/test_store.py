from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import until

from bench.errors import UserError
from bench.files import read_json, write_json
from bench.protocol.protocol import Protocol
from bench.store.locks import hold, is_alive, is_held
from bench.store.records import (
    KEY_FORMAT,
    DataInputs,
    Inputs,
    JobRecord,
    MethodInputs,
    Progress,
    RunChain,
    RunRecord,
    write_record,
)
from bench.store.results import STALE_SECONDS, Run, Store
from bench.testing.tensors import tensor_dataset

KEY = "0123456789abcdef"
HOLDER = """
import sys
from pathlib import Path

from bench.store.locks import hold

with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "results")
    found.make()
    return found


def job(key: str) -> JobRecord:
    """The record of some job under a key."""
    data = DataInputs(set="tensors", train="", test="")
    method = MethodInputs(name="ft", version=[1], settings={})
    inputs = Inputs(
        format=KEY_FORMAT, kind="train", data=data, classes=[[1]], images="", method=method, training={},
        smoke=False, seed=0, parent=None,
    )  # fmt: skip
    protocol = Protocol("tiny", tensor_dataset(2), "overlapped", ((1,),))
    return JobRecord(key=key, inputs=inputs, step=0, method="ft", settings={}, protocol=protocol, images=4)


def artifact(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in ("weights", "metrics.json"):
            (folder / name).write_text(json.dumps(text))

    return write


def cause(store: Store) -> str:
    """Why the job failed."""
    failure = store.state(KEY).failure
    assert failure is not None
    return failure.error


def holder(lock: Path) -> subprocess.Popen[str]:
    """A process that holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


# ---- the life of a job -------------------------------------------------------------------------------------


def test_every_state_of_a_job(store: Store) -> None:
    def state() -> str:
        return store.state(KEY).state

    assert state() == "waiting"
    store.open_work(job(KEY))
    assert state() == "waiting"
    store.note_submission(KEY, "run", cluster="local", pid=os.getpid())
    assert state() == "submitted"
    with store.lock(KEY):
        assert state() == "running"
        store.report_progress(KEY, 0.0, phase="training", epoch=1)
        assert (state(), getattr(store.state(KEY).progress, "epoch", None)) == ("running", 1)
    assert state() == "interrupted"
    store.report_failure(KEY, "the cause", "the log")
    assert (state(), cause(store)) == ("failed", "the cause")
    store.open_work(job(KEY))
    assert state() == "waiting"
    with store.lock(KEY):
        store.publish(KEY, artifact("one"))
        assert state() == "running"
        store.clear_work(KEY)
    assert state() == "done"
    store.open_work(job(KEY), fresh=True)  # --force: the old artifact is still there
    assert (state(), store.done(KEY)) == ("waiting", True)


def test_a_process_that_is_gone_does_not_run_even_if_nobody_asked_how_it_ended(store: Store) -> None:
    store.open_work(job(KEY))
    process = holder(store.logs(KEY) / "lock")
    store.note_submission(KEY, "run", cluster="local", pid=process.pid)
    assert store.state(KEY).state == "running"
    process.kill()  # without a wait: it stays in the table of processes
    until(lambda: store.state(KEY).state != "running", "the end of its lock")
    assert store.state(KEY).state == "interrupted"
    assert not is_alive(process.pid)
    process.wait()
    assert not is_alive(process.pid)
    assert is_alive(os.getpid())


def test_a_job_of_another_machine_runs_as_long_as_it_reports(store: Store) -> None:
    store.open_work(job(KEY))
    path = store.work(KEY) / "progress.json"
    for age, state in ((0.0, "running"), (STALE_SECONDS + 1, "interrupted")):
        write_record(path, Progress(host="elsewhere", pid=1, updated=time.time() - age))
        assert store.state(KEY).state == state


def test_the_first_cause_of_a_failure_stays(store: Store) -> None:
    store.report_failure(KEY, "the cause", "")
    store.report_failure(KEY, "its consequence", "")
    assert cause(store) == "the cause"
    store.clear_failure(KEY)
    assert store.state(KEY).state == "waiting"


def test_what_is_resumed_keeps_its_checkpoint_and_what_is_fresh_does_not(store: Store) -> None:
    store.open_work(job(KEY))
    checkpoint = store.work(KEY) / "checkpoint.safetensors"
    checkpoint.touch()
    store.report_progress(KEY, 0.0, phase="training")
    store.open_work(job(KEY))
    assert checkpoint.exists()
    assert store.state(KEY).progress is None
    store.open_work(job(KEY), fresh=True)
    assert not checkpoint.exists()


def test_a_reader_never_sees_a_job_between_two_states(store: Store) -> None:
    """A thread leads jobs through their lives; who reads meanwhile sees them begin, run and be done."""
    keys = [f"{i:016x}" for i in range(60)]

    def live() -> None:
        for key in keys:
            store.open_work(job(key))
            store.note_submission(key, "run", cluster="local", pid=os.getpid())
            with store.lock(key):
                for iteration in range(3):
                    store.report_progress(key, 0.0, phase="training", iteration=iteration)
                store.publish(key, artifact(key))
                store.clear_work(key)

    seen: dict[str, list[str]] = {key: [] for key in keys}
    with ThreadPoolExecutor(1) as pool:
        life = pool.submit(live)
        while not life.done():
            for key in keys:
                state = store.state(key).state
                if state not in seen[key][-1:]:
                    seen[key].append(state)
        life.result()
    order = ["waiting", "submitted", "running", "done"]
    for key in keys:
        assert seen[key] == sorted(seen[key], key=order.index), seen[key]
        assert store.state(key).state == "done"


# ---- locks -------------------------------------------------------------------------------------------------


def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    lock, inside = tmp_path / "deep" / "lock", []

    def work(name: int) -> None:
        with hold(lock):
            inside.append((name, "in"))
            assert is_held(lock)
            inside.append((name, "out"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert all(inside[i][0] == inside[i + 1][0] for i in range(0, 16, 2))
    assert not is_held(lock)


def test_asking_for_a_lock_does_not_take_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert not is_held(lock)
    assert not lock.exists()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            is_held(lock)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(20):
            with hold(lock):
                assert is_held(lock)
    finally:
        stop.set()
        for asker in askers:
            asker.join()


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    process = holder(lock)
    assert is_held(lock)
    process.send_signal(signal.SIGKILL)
    with hold(lock):
        process.wait()


# ---- artifacts and files -----------------------------------------------------------------------------------


def test_an_artifact_appears_whole_or_not_at_all(store: Store) -> None:
    def breaks(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError):
        store.publish(KEY, breaks)
    assert not store.artifact(KEY).exists()
    store.publish(KEY, artifact("one"))  # what the attempt before it left is gone
    with pytest.raises(RuntimeError):
        store.publish(KEY, breaks)
    assert read_json(store.artifact(KEY) / "weights") == "one"
    store.publish(KEY, artifact("two"))
    assert read_json(store.artifact(KEY) / "weights") == "two"
    assert [path.name for path in (store.root / "jobs").iterdir()] == [KEY]


def test_json_is_never_seen_half_written(tmp_path: Path) -> None:
    path, texts = tmp_path / "file.json", ["a" * 200_000, "b" * 100_000]
    write_json(path, texts[0])

    def write() -> None:
        for i in range(60):
            write_json(path, texts[i % 2])

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not writing.done():
            assert read_json(path) in texts
        writing.result()
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_damaged_file_is_named(store: Store) -> None:
    store.open_work(job(KEY))
    (store.work(KEY) / "failure.json").write_text("{")
    with pytest.raises(
        UserError, match=r"work/0123456789abcdef/failure\.json: damaged: .*; delete it and run again"
    ):
        store.state(KEY)


@pytest.mark.parametrize("root", ["file/results", "/proc/results"])
def test_a_folder_that_cannot_be_written_is_named(in_tmp: Path, root: str) -> None:
    (in_tmp / "file").touch()
    with pytest.raises(
        UserError,
        match=rf"results folder {root}: cannot be written \(.*\); choose another with --results DIR",
    ):
        Store(root).make()


# ---- runs and links ----------------------------------------------------------------------------------------


def test_links_lead_to_what_is_done(store: Store) -> None:
    place = "voc-15-1/small/mib/seed-3/step-2"
    store.link(place, KEY)
    assert list(store.links()) == []  # the artifact is not there yet
    store.publish(KEY, artifact("one"))
    ((*names, folder),) = store.links()
    assert names == ["voc-15-1", "small", "mib", 3, 2]
    assert read_json(folder / "weights") == "one"
    store.link(place, "f" * 16)
    assert list(store.links()) == []
    store.link(place, KEY)
    shutil.move(store.root, store.root.with_name("moved"))
    assert len(list(Store(store.root.with_name("moved")).links())) == 1


def test_runs_are_recorded_with_their_driver(store: Store) -> None:
    assert Store(store.root / "none").runs() == []
    record = RunRecord(chains=[RunChain(keys=[KEY], places=["a/b/c/seed-0/step-0"])])
    name = store.record_run(record)
    assert store.runs() == [Run(name, record)]
    assert not store.is_driven(name)
    with store.driving(name):
        assert store.is_driven(name)
    assert not store.is_driven(name)
