from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Bench, until

import bench
from bench.errors import UserError
from bench.launch.profile import load_profile
from bench.store.locks import is_alive


def test_a_job_is_trained_once_and_again_only_by_force(command: Bench) -> None:
    words = command.one_step()
    status, out, error = command("run", *words)
    assert status == 0, error
    assert "Brittle" in out
    (key,) = command.keys("brittle")
    assert command.store.state(key).state == "done"
    assert [line.split()[:2] for line in command.begun()] == [["0", "0"], ["0", "1"]]
    started, done = error.splitlines()
    assert re.fullmatch(rf"started one-step brittle\[.*\] seed 0 step 0  \[{key}\]", started)
    assert re.fullmatch(r"done    one-step brittle\[.*\] seed 0 step 0  mIoU all [\d.]+", done)
    assert not any((command.store.root / "work").iterdir())

    status, _, error = command("run", *words)
    assert status == 0
    assert "nothing to do: all 1 jobs are done already (train them again with --force)" in error
    assert len(command.begun()) == 2

    inode = command.store.artifact(key).stat().st_ino
    hold = command.hold(0)
    driver = command.start("run", *words, "--force")
    command.held(0)
    assert (
        command.store.artifact(key).stat().st_ino == inode
    )  # the old result stays until the new one is whole
    assert command.store.done(key)
    hold.unlink()
    status, _, error = command.finish(driver)
    assert status == 0, error
    assert len(command.begun()) == 4
    assert command.store.artifact(key).stat().st_ino != inode
    assert [path.name for path in (command.store.root / "jobs").iterdir()] == [key]


def test_a_failing_job_stops_only_its_descendants(command: Bench) -> None:
    (command.folder / "fail-0").touch()
    words = command.plan("brittle,ft")
    status, _, error = command("run", *words)
    assert status == 1
    first, second = command.keys("brittle")
    failure = command.store.state(first).failure
    assert failure is not None
    log = failure.log
    assert "seed 0 step 0: RuntimeError: asked to fail at step 0" in error
    assert f"log: {log}" in error
    assert "asked to fail at step 0" in Path(log).read_text()
    assert "1 jobs were not run because a step before them failed" in error
    assert [command.store.state(key).state for key in (first, second)] == ["failed", "waiting"]
    assert [command.store.state(key).state for key in command.keys("ft")] == ["done"] * 2

    status, _, error = command("run", *words, "--keep-failed")
    assert status == 1
    assert "asked to fail at step 0" in error
    assert len(command.begun()) == 1


def test_an_interrupted_run_stops_its_processes_and_resumes(command: Bench) -> None:
    def begun(epochs: int) -> Callable[[], bool]:
        return lambda: len(command.begun()) == epochs

    hold = command.hold(0)
    for kill, number, epochs in ((os.killpg, signal.SIGINT, 2), (os.kill, signal.SIGTERM, 3)):
        driver = command.start("run", *command.one_step())
        key = command.held(0)
        until(begun(epochs), "the second epoch")
        pid = command.pid(key)
        kill(driver.pid, number)
        status, _, error = command.finish(driver)
        assert status == 130
        assert error.splitlines()[-1] == "stopped; run the same command again to resume"
        assert "Traceback" not in error
        assert not is_alive(pid)
        assert list(command.status().values()) == ["interrupted"]

    hold.unlink()
    status, _, error = command("run", *command.one_step())
    assert status == 0, error
    assert [line.split()[1] for line in command.begun()] == [
        "0",
        "1",
        "1",
        "1",
    ]  # its first epoch was trained once


def test_a_killed_driver_leaves_jobs_that_the_next_one_adopts_or_stops(command: Bench) -> None:
    hold = command.hold(0)
    driver = command.start("run", *command.one_step(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid = command.pid(command.held(0))
    driver.kill()
    driver.wait()
    status, out, _ = command("status")
    assert (status, out.splitlines()[-1]) == (0, "1 running")

    second = command.start("run", *command.one_step())
    assert second.stderr is not None
    assert second.stderr.readline().startswith("adopted")
    second.send_signal(signal.SIGHUP)  # its terminal is closed
    assert command.finish(second)[0] == 130
    command.gone(pid)

    driver = command.start("run", *command.one_step(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    key = command.held(0)
    until(lambda: len(command.begun()) == 3, "its second epoch, again")
    pid = command.pid(key)
    driver.kill()
    driver.wait()
    third = command.start("run", *command.one_step())
    assert third.stderr is not None
    assert third.stderr.readline().startswith("adopted")
    hold.unlink()
    status, _, error = command.finish(third)
    assert status == 0, error
    assert len(command.begun()) == 3
    command.gone(pid)


def test_a_killed_job_is_noticed_and_retried_from_its_last_epoch(command: Bench) -> None:
    hold = command.hold(0)
    driver = command.start("run", *command.one_step())
    key = command.held(0)
    os.kill(command.pid(key), signal.SIGKILL)
    status, _, error = command.finish(driver)
    assert status == 1
    assert "step 0: its process ended with status -9 without a result; last words: " in error
    assert list(command.status().values()) == ["failed"]

    driver = command.start("run", *command.one_step(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command.held(0)
    until(lambda: len(command.begun()) == 3, "its second epoch, again")
    driver.kill()
    driver.wait()
    second = command.start("run", *command.one_step())
    assert second.stderr is not None
    assert second.stderr.readline().startswith("adopted")
    pid = command.pid(key)
    os.kill(pid, signal.SIGKILL)
    status, _, error = command.finish(second)
    assert status == 1
    assert re.search(rf"step 0: its process {pid} on \S+ ended without a result", error)

    hold.unlink()
    assert command("run", *command.one_step())[0] == 0
    log = max(command.store.logs(key).glob("*.out"))
    assert f"resuming {key}: phase 0, 1 epochs done" in log.read_text()


def test_two_runs_at_once_train_no_job_twice(command: Bench) -> None:
    runs = [command.start("run", *command.one_step()) for _ in range(2)]
    for status, _, error in map(command.finish, runs):
        assert status == 0, error
    assert [line.split()[:2] for line in command.begun()] == [["0", "0"], ["0", "1"]]


def test_jobs_get_one_gpu_each(command: Bench) -> None:
    command.environment["CUDA_VISIBLE_DEVICES"] = "GPU-aa,5"
    status, _, error = command("run", *command.one_step("--seeds", "0,1"))
    assert status == 0, error
    assert {line.split()[2] for line in command.begun()} == {"GPU-aa", "5"}


def test_a_terminal_shows_what_runs(command: Bench) -> None:
    hold = command.hold(0)
    command.environment["COLUMNS"] = "160"
    ours, theirs = pty.openpty()
    driver = command.start("run", *command.one_step(), stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = ""

    def shows(pattern: str) -> bool:
        nonlocal shown
        with contextlib.suppress(OSError):  # the other end is closed
            if select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 65536).decode()
        return re.search(pattern, shown) is not None

    progress = r"one-step brittle\[\S+\] seed 0 step 0 +training, epoch 1/2, \d/\d+, loss \d\.\d{3}"
    until(lambda: shows(progress), "the progress of the job")
    assert shows(r"0 of 1 jobs done +\d+ s so far")
    assert "\x1b[" in shown
    hold.unlink()
    until(lambda: shows(r"done +one-step brittle"), "the job's end")
    until(lambda: shows(r"1 of 1 jobs done"), "the run's end")
    assert driver.wait() == 0
    os.close(ours)


def test_an_inline_job_stops_alike(command: Bench) -> None:
    command.hold(0)
    driver = command.start("run", *command.one_step("--cluster", "inline"))
    until(lambda: command.store.runs(), "the record of the run")
    (key,) = command.keys("brittle")
    until((command.store.work(key) / "checkpoint.safetensors").exists, "a checkpoint")
    driver.send_signal(signal.SIGINT)
    status, _, error = command.finish(driver)
    assert status == 130
    assert error.splitlines()[-1] == "stopped; run the same command again to resume"
    assert command.store.state(key).state == "interrupted"


BAD = [
    (
        ["--results", "file/below"],
        "results folder file/below: cannot be written (Not a directory); choose another with --results DIR",
    ),
    (["--results", "/proc/results"], "results folder /proc/results: cannot be written"),
    (["--cluster", "lokal"], "--cluster: unknown cluster 'lokal'; did you mean 'local'?"),
    (["--detach"], "--detach: only a queue keeps jobs without this process; use --cluster slurm"),
    (["--profile", "default"], "--profile default: an option of --cluster slurm, not of --cluster local"),
    (
        ["--cluster", "inline", "--jobs", "2"],
        "--jobs 2: an option of --cluster local, not of --cluster inline",
    ),
    (
        ["--cluster", "slurm", "--profile", "one-machin"],
        "--profile: unknown profile 'one-machin'; did you mean 'one-machine'?",
    ),
    (["--cluster", "slurm", "--profile", "bad.toml"], "bad.toml: unknown key 'cpu'; did you mean 'cpus'?"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_what_cannot_be_is_said_in_one_line(
    toy: Callable[..., Path], in_tmp: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (in_tmp / "file").touch()
    (in_tmp / "bad.toml").write_text("cpu = 4\n")
    from bench.cli import main

    assert main(["run", "--protocol", str(toy()), "--methods", "ft", "--set", "batch_size=4", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpus = 0", r"p\.toml: cpus = 0: Input should be greater than or equal to 1"),
        ('mem_gb = "much"', r"p\.toml: mem_gb = 'much': Input should be a valid number"),
        (
            "[sbatch]\nx = [1]",
            r"p\.toml: sbatch: x: \[1\] is no option's value; allowed: text, a number, true or false",
        ),
        ("cpus = ", r"p\.toml: not a TOML file"),
    ],
)
def test_a_profile_is_checked(in_tmp: Path, text: str, message: str) -> None:
    Path("p.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_profile("p.toml")


def test_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.cli import main

    assert main(["list", "profiles"]) == 0
    assert re.findall(r"^(default|one-machine) ", capsys.readouterr().out, re.MULTILINE) == [
        "default",
        "one-machine",
    ]


def test_a_run_from_python_outside_the_main_thread(
    toy: Callable[..., Path], in_tmp: Path, quick: list[str]
) -> None:
    """Signals belong to the main thread; a run elsewhere goes without."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(
            bench.run, str(toy(then=2)), "ft", set=quick, results="r", cluster="inline"
        ).result()
    assert run.outcome.ok


def test_more_jobs_at_once_are_no_other_numbers(command: Bench) -> None:
    """Threads are a setting, in the key: cores decide how many jobs run at once, never what they find."""
    weights = []
    for jobs in ("1", "2"):
        results = ["--results", f"r{jobs}", "--jobs", jobs]
        status, _, error = command("run", *command.plan("mib", *results, protocol=command.protocol))
        assert status == 0, error
        found = sorted((command.folder / f"r{jobs}" / "jobs").glob("*/model.safetensors"))
        weights.append({path.parent.name: path.read_bytes() for path in found})
    assert len(weights[0]) == 2
    assert weights[0] == weights[1]


def test_slots_follow_cores_threads_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.launch import local

    monkeypatch.setattr(local, "cores", lambda: 12)
    monkeypatch.setattr(local, "memory_bytes", lambda: None)
    assert local.default_slots(["0", "1"]) == 2
    assert local.default_slots([]) == 12
    assert local.default_slots([], threads=5) == 2
    assert local.default_slots([], threads=50) == 1
    monkeypatch.setattr(local, "memory_bytes", lambda: 9 * 2**30)
    assert local.default_slots([]) == 4


def test_a_job_has_its_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.launch.executor import process_environment

    assert process_environment(3)["OMP_NUM_THREADS"] == "3"
