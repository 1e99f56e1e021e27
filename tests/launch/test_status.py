from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from commands import Bench

from bench import cli
from bench.data.index import ClassIndex
from bench.launch import display, status
from bench.plan.make import make_plan
from bench.store.records import JobRecord, RunChain, RunRecord
from bench.store.results import Store

KEYS = [f"{i:016x}" for i in range(5)]
PLACES = [f"voc-15-1/small/mib/seed-0/step-{t}" for t in range(5)]


def a_record() -> JobRecord:
    """Of any job."""
    index = ClassIndex(("a",) * 60, (0b11111111110,) * 60, "f" * 16)
    plan = make_plan(["shapes-6-2"], ["ft"], "small", indexes={"shapes": {"train": index, "test": index}})
    return plan.record(plan.chains[0].keys[0])


@pytest.fixture
def store(in_tmp: Path) -> Store:
    """A run whose five steps are done, running, submitted, failed, waiting."""
    found, record = Store(in_tmp / "results"), a_record()
    found.make()
    found.record_run(RunRecord(chains=[RunChain(keys=KEYS, places=PLACES)]))
    found.publish(KEYS[0], lambda folder: (folder / "metrics.json").touch())
    for key in KEYS[1:4]:
        found.open_work(record.model_copy(update={"key": key}))
    found.report_progress(
        KEYS[1],
        0.0,
        phase="training",
        epoch=3,
        epochs=10,
        iteration=120,
        iterations=400,
        loss=0.5312,
        eta=100,
    )
    found.note_submission(KEYS[2], run="r", cluster="local", pid=os.getpid())
    found.report_failure(KEYS[3], "the loss\nis nan", "log.out")
    return found


def test_states_are_shown_with_what_is_known_of_them(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with store.lock(KEYS[1]):
        rows = status.status_data(store)
    assert [row.state for row in rows] == ["done", "running", "submitted", "failed", "waiting"]
    assert [row.places for row in rows] == [(place,) for place in PLACES]
    lines = display.status_text(rows, driven=True).splitlines()
    assert lines[2].split("  ")[-1] == "training, epoch 3/10, 120/400, loss 0.531, 2 min left"
    assert lines[4].endswith("failed     the loss is nan")
    assert lines[-1] == "1 done, 1 running, 1 submitted, 1 failed, 1 waiting"
    last = display.status_text(rows, driven=False).splitlines()[-1]
    assert last == "no bench run is at it now: run the same command again to go on"

    assert cli.main(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in found] == ["done", "interrupted", "submitted", "failed", "waiting"]
    assert found[1]["progress"]["loss"] == 0.5312
    assert found[3]["failure"]["log"] == "log.out"


def test_the_last_run_is_shown_or_all(store: Store) -> None:
    place = "voc-15-5/small/mib/seed-0/step-0"
    store.record_run(RunRecord(chains=[RunChain(keys=KEYS[:1], places=[place])]))
    assert [row.key for row in status.status_data(store)] == KEYS[:1]
    rows = status.status_data(store, every_run=True)
    assert [row.key for row in rows] == KEYS
    assert rows[0].places == (PLACES[0], place)
    assert "step-0 (+1)" in display.status_text(rows)


def test_a_folder_without_runs(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--results", "nowhere"]) == 0
    assert capsys.readouterr().out == "no run in this results folder\n"
    assert not Path("nowhere").exists()
    assert cli.main(["status", "--watch"]) == 0


def test_watching_ends_when_nothing_goes_on(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.clear_work(KEYS[2])
    let_go, held = threading.Event(), threading.Event()

    def work() -> None:
        with store.lock(KEYS[1]):
            held.set()
            let_go.wait()

    worker, watcher = threading.Thread(target=work), threading.Thread(target=display.watch, args=(store,))
    worker.start()
    held.wait()
    watcher.start()
    watcher.join(timeout=0.1)
    assert watcher.is_alive()  # one job is running
    let_go.set()
    worker.join()
    watcher.join()
    assert "1 done, 1 failed, 1 interrupted, 2 waiting" in capsys.readouterr().out


def test_a_run_is_followed_from_another_terminal_and_after_its_driver_died(command: Bench) -> None:
    command.hold(0)
    driver = command.start("run", *command.plan("brittle"))
    key = command.held(0)
    pid = command.pid(key)
    _, out, _ = command("status")
    assert out.splitlines()[-1] == "1 running, 1 waiting"
    assert "training, epoch 1/2, 1/6, loss" in out
    driver.kill()
    driver.communicate()
    _, out, _ = command("status")
    nobody = "no bench run is at it now: run the same command again to go on"
    assert out.splitlines()[-2:] == ["1 running, 1 waiting", nobody]
    os.kill(pid, 9)
    command.gone(pid)
    _, out, _ = command("status", "--watch")
    assert "1 interrupted, 1 waiting" in out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (91, "2 min"),
        (5369, "89 min"),
        (5400, "1 h 30 min"),
        (36000, "10 h 00 min"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert display.duration(seconds) == text
