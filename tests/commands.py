"""bench as a user runs it, in a process of its own, and a method that fails or waits where a test says so."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.store.locks import is_alive
from bench.store.results import Store

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 90.0
"""Seconds after which what a test waits for counts as never happening."""

BRITTLE = '''
import os
import time
from pathlib import Path

from bench.method import Method


class Brittle(Method):
    """Fine-tuning that fails at step T while there is a file fail-T in the current folder, and waits in its
    second epoch while there is a hold-T."""

    title = "Brittle"

    def batches(self, epoch):
        t = self.step.index
        with open("begun.txt", "a") as file:
            print(t, epoch, os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
        if Path(f"fail-{t}").exists():
            raise RuntimeError(f"asked to fail at step {t}")
        while epoch and Path(f"hold-{t}").exists():
            time.sleep(0.01)
        return super().batches(epoch)
'''


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition; its value."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"never happened: {what}")


class Bench:
    """A throw-away benchmark, and the command `bench` in its folder.

    Attributes:
        folder: where it works; it holds a toy data set and a protocol of two steps, and one-step.toml.
        store: its results.
    """

    def __init__(self, folder: Path, protocol: Path) -> None:
        self.folder, self.protocol, self.store = folder, protocol.name, Store(folder / "results")
        (folder / "one-step.toml").write_text('dataset = "toy-set.toml"\nsteps = [[1, 2, 3, 4]]\n')
        package = folder / "site"
        (package / "brittle-1.dist-info").mkdir(parents=True)
        (package / "brittle_method.py").write_text(BRITTLE)
        (package / "brittle_method.toml").write_text("")
        about = package / "brittle-1.dist-info"
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brittle\nVersion: 1\n")
        (about / "entry_points.txt").write_text("[bench.methods]\nbrittle = brittle_method\n")
        path = os.pathsep.join([str(ROOT), str(package)])
        self.environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.left: list[int] = []
        self.runs_before = 0

    def plan(self, methods: str, *more: str, protocol: str | None = None) -> list[str]:
        """The words of a run that takes seconds."""
        sets = [
            word
            for item in ("epochs=2", "first_epochs=2", "batch_size=4", "crop=32", "checkpoint_minutes=0")
            for word in ("--set", item)
        ]
        return ["--protocol", protocol or self.protocol, "--methods", methods, *sets, *more]

    def one_step(self, *more: str) -> list[str]:
        """The words of a run of a single brittle job."""
        return self.plan("brittle", *more, protocol="one-step.toml")

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A command, under way, in a process group of its own."""
        self.runs_before = len(self.store.runs())
        command = [sys.executable, "-m", "bench", *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, start_new_session=True, **options
        )

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """A command until its end: exit status, output, errors."""
        return self.finish(self.start(*arguments))

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, error = process.communicate(timeout=PATIENCE)
        return process.returncode, out, error

    def keys(self, method: str) -> list[str]:
        """Keys of the method's steps in the last run."""
        chains = self.store.runs()[-1].record.chains
        return next(
            chain.keys for chain in chains if chain.places[0].split("/")[2].partition("[")[0] == method
        )

    def hold(self, step: int) -> Path:
        path = self.folder / f"hold-{step}"
        path.touch()
        return path

    def held(self, step: int, method: str = "brittle") -> str:
        """Wait until the job of a step has finished an epoch and waits in its second; its key."""
        until(lambda: len(self.store.runs()) > self.runs_before, "the record of the run")
        key = self.keys(method)[step]
        second = f"{step} 1 "
        until(lambda: any(line.startswith(second) for line in self.begun()), f"a second epoch of step {step}")
        submitted = lambda: self.store.state(key).submission and self.store.state(key).state == "running"  # noqa: E731
        until(submitted, "the note of its submission")
        return key

    def pid(self, key: str) -> int:
        """The process at work on a job."""
        progress = self.store.state(key).progress
        assert progress is not None
        pid = progress.pid
        self.left.append(pid)
        return pid

    def gone(self, pid: int) -> None:
        until(lambda: not is_alive(pid), f"the end of process {pid}")

    def begun(self) -> list[str]:
        """ "step epoch gpu" of each epoch that a brittle job began."""
        path = self.folder / "begun.txt"
        return path.read_text().splitlines() if path.exists() else []

    def status(self) -> dict[str, str]:
        """State by place, as bench status --json tells it."""
        status, out, error = self("status", "--json")
        assert status == 0, error
        return {place: row["state"] for row in json.loads(out) for place in row["places"]}

    def stop_all(self) -> None:
        """Stop what a failing test left running."""
        for pid in self.left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
