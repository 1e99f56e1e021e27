"""The results folder: what is done, what is under way, what failed. Everything the command line says of a
run, it reads here.

    results/jobs/<key>/             artifact of a finished job; appears whole or not at all
    results/work/<key>/             a job under way: job.json, checkpoint, submitted.json, progress.json,
                                    failure.json
    results/logs/<key>/             what its processes printed, and the lock that the one at work holds
    results/runs/<time>-<id>.json   what a `bench run` asked for; <time>-<id>.lock is held while it runs
    results/<protocol>/<track>/<method>/seed-<n>/step-<t>   links for people, and the index of reports
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from bench.errors import UserError
from bench.files import check_writable
from bench.store.locks import hold, is_alive, is_held
from bench.store.records import (
    Failure,
    JobRecord,
    Metrics,
    Progress,
    Record,
    RunRecord,
    Submission,
    read_record,
    write_record,
)

RESULTS_VARIABLE = "CISS_BENCH_RESULTS"
RESERVED = ("jobs", "work", "logs", "runs", "smoke", "published")
STALE_SECONDS = 300.0
"""A job that has not reported for this long from another machine, whose locks may be invisible here, counts
as interrupted."""

STATES = ("done", "running", "submitted", "failed", "interrupted", "waiting")


@dataclass(frozen=True)
class JobState:
    """What is known of a job.

    Attributes:
        state: "done": its artifact is there; "running": a process is at work on it; "submitted": handed to an
            executor, whose process has not begun; "failed": its last attempt ended in an error;
            "interrupted": its process is gone without a word, it can be resumed; "waiting": nothing was
                tried.
        progress, failure, submission: what its process last reported, what stopped it, and to whom it was
            handed.
    """

    state: str
    progress: Progress | None = None
    failure: Failure | None = None
    submission: Submission | None = None


class Link(NamedTuple):
    """A finished result as people find it."""

    protocol: str
    track: str
    method: str
    seed: int
    step: int
    folder: Path


class Run(NamedTuple):
    """A recorded run."""

    name: str
    record: RunRecord


class Store:
    """One results folder."""

    def __init__(self, root: str | Path | None = None, smoke: bool = False) -> None:
        self.root = Path(root or os.environ.get(RESULTS_VARIABLE) or "results") / ("smoke" if smoke else "")

    def make(self) -> None:
        """Create the folder and make sure that it can be written."""
        try:
            for name in ("jobs", "work", "logs", "runs"):
                check_writable(self.root / name)
        except OSError as error:
            cure = "choose another with --results DIR"
            raise UserError(
                f"results folder {self.root}: cannot be written ({error.strerror}); {cure}"
            ) from None

    # ---- artifacts -----------------------------------------------------------------------------------------

    def artifact(self, key: str) -> Path:
        return self.root / "jobs" / key

    def done(self, key: str) -> bool:
        """Whether a finished artifact is there; it may be an older one than the job under way will leave
        (--force)."""
        return (self.artifact(key) / Metrics.file).is_file()

    def publish(self, key: str, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, then move it into place in one step; an older artifact makes room
        first."""
        target = self.artifact(key)
        aside, old = (target.with_name(f".{key}.{word}") for word in ("new", "old"))
        for folder in (aside, old):  # a process that was killed here may have left them
            shutil.rmtree(folder, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def metrics(self, key: str) -> Metrics | None:
        """The metrics of a finished job; None if it is not finished."""
        return read_record(self.artifact(key) / Metrics.file, Metrics)

    # ---- work under way ------------------------------------------------------------------------------------

    def work(self, key: str) -> Path:
        return self.root / "work" / key

    def logs(self, key: str) -> Path:
        return self.root / "logs" / key

    def open_work(self, record: JobRecord, fresh: bool = False) -> Path:
        """The work folder of a job about to be submitted; `fresh` throws away what an earlier attempt
        left."""
        folder = self.work(record.key)
        if fresh:
            self.clear_work(record.key)
        folder.mkdir(parents=True, exist_ok=True)
        self.withdraw(record.key)
        self.clear_failure(record.key)
        write_record(folder / JobRecord.file, record)
        return folder

    def record(self, key: str) -> JobRecord:
        """The record of a job under way.

        Raises:
            UserError: there is none.
        """
        found = read_record(self.work(key) / JobRecord.file, JobRecord)
        if found is None:
            raise UserError(f"{self.work(key)}: no {JobRecord.file}; jobs are submitted by bench run")
        return found

    def lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        """The right to work on a job: only one process has it at a time, so no job is ever trained twice at
        once."""
        return hold(self.logs(key) / "lock")

    def clear_failure(self, key: str) -> None:
        (self.work(key) / Failure.file).unlink(missing_ok=True)

    def report_progress(
        self,
        key: str,
        started: float,
        phase: str,
        iteration: int = 0,
        iterations: int = 0,
        epoch: int = 0,
        epochs: int = 0,
        loss: float | None = None,
        eta: float | None = None,
    ) -> None:
        """Note how far this process is with a job."""
        progress = Progress(
            host=socket.gethostname(),
            pid=os.getpid(),
            updated=time.time(),
            started=started,
            phase=phase,
            iteration=iteration,
            iterations=iterations,
            epoch=epoch,
            epochs=epochs,
            loss=loss,
            eta=eta,
        )
        write_record(self.work(key) / Progress.file, progress)

    def note_submission(
        self,
        key: str,
        run: str,
        cluster: str,
        log: str = "",
        pid: int | None = None,
        gpu: str | None = None,
        id: str | None = None,
    ) -> None:
        """Note to whom a job was handed; a job that is over already has no folder any more."""
        submission = Submission(
            host=socket.gethostname(), run=run, cluster=cluster, log=log, pid=pid, gpu=gpu, id=id
        )
        with contextlib.suppress(FileNotFoundError):
            write_record(self.work(key) / Submission.file, submission)

    def withdraw(self, key: str) -> None:
        """Forget that a job was submitted or made progress; what it needs to be resumed stays."""
        for name in (Submission.file, Progress.file):
            (self.work(key) / name).unlink(missing_ok=True)

    def report_failure(self, key: str, error: str, log: str) -> None:
        """Note why a job stopped. The first cause stays: of processes that train together, the others fail
        because one did."""
        path = self.work(key) / Failure.file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_record(path, Failure(error=error, log=log, when=time.time()))

    def state(self, key: str) -> JobState:
        """What the folder says of a job, whoever started it."""
        found = self._look(key)
        return (
            self._look(key) if found.state == "interrupted" else found
        )  # it may have begun while it was looked at

    def _look(self, key: str) -> JobState:
        """What the folder says of a job now.

        The lock is looked at first: a process leaves its artifact or its failure before it lets go, so once
        the lock is free, the files that are read after it are final.
        """
        held = is_held(self.logs(key) / "lock")
        folder = self.work(key)
        failure = read_record(folder / Failure.file, Failure)
        progress = read_record(folder / Progress.file, Progress)
        submission = read_record(folder / Submission.file, Submission)
        if failure:
            state = "failed"
        elif held or (progress and _reports_from_elsewhere(progress)):
            state = "running"
        elif not (folder / JobRecord.file).is_file():
            state = "done" if self.done(key) else "waiting"
        elif progress or (submission and _ended_early(submission)):
            state = "interrupted"
        else:
            state = "submitted" if submission else "waiting"
        return JobState(state, progress, failure, submission)

    def keys(self) -> set[str]:
        """Jobs of which there is an artifact or a work folder; the state of any other is "waiting"."""
        folders = [self.root / name for name in ("jobs", "work")]
        return {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}

    def clear_work(self, key: str) -> None:
        """Remove the work folder of a job that is over; for a reader it is there or gone, never half."""
        aside = self.root / "work" / f".{key}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            self.work(key).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    # ---- runs and links ------------------------------------------------------------------------------------

    def record_run(self, run: RunRecord) -> str:
        """Note what a `bench run` asked for, so that status and resume need no running driver. Returns the
        run's name."""
        name = f"{datetime.now():%Y%m%d-%H%M%S-%f}-{os.getpid()}"
        write_record(self.root / "runs" / f"{name}.json", run)
        return name

    def driving(self, run: str) -> contextlib.AbstractContextManager[None]:
        """Held by the driver of a run as long as it lives."""
        return hold(self.root / "runs" / f"{run}.lock")

    def is_driven(self, run: str) -> bool:
        """Whether the driver of a run is still there."""
        return is_held(self.root / "runs" / f"{run}.lock")

    def runs(self) -> list[Run]:
        """All recorded runs, oldest first."""
        folder = self.root / "runs"
        found = (
            [(p.stem, read_record(p, RunRecord)) for p in sorted(folder.glob("*.json"))]
            if folder.is_dir()
            else []
        )
        return [Run(name, record) for name, record in found if record]

    def write(self, place: str, record: Record) -> None:
        """Write a record beside links, results/<place>."""
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, record)

    def link(self, place: str, key: str) -> None:
        """Point results/<place> to a job's artifact, also before it is there."""
        link = self.root / place
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(self.artifact(key), link.parent)
        if link.is_symlink() and os.readlink(link) == target:
            return
        aside = link.with_name(f".{link.name}.{os.getpid()}")
        aside.unlink(missing_ok=True)
        aside.symlink_to(target)
        aside.replace(link)

    def links(self) -> Iterator[Link]:
        """Every finished result."""
        if not self.root.is_dir():
            return
        for top in sorted(self.root.iterdir()):
            if top.name in RESERVED or top.name.startswith(".") or not top.is_dir():
                continue
            for link in sorted(top.glob("*/*/seed-*/step-*")):
                if (link / Metrics.file).is_file():
                    track, method, seed, step = link.relative_to(top).parts
                    numbers = int(seed.removeprefix("seed-")), int(step.removeprefix("step-"))
                    yield Link(top.name, track, method, *numbers, link)


def _reports_from_elsewhere(progress: Progress) -> bool:
    """Whether a job on another machine, whose lock this one may not see, reported lately."""
    return progress.host != socket.gethostname() and time.time() - progress.updated < STALE_SECONDS


def _ended_early(submission: Submission) -> bool:
    """Whether a job was handed to a process of this machine that is gone before it began."""
    return (
        submission.host == socket.gethostname()
        and submission.pid is not None
        and not is_alive(submission.pid)
    )
