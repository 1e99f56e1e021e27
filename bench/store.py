"""The results folder: what is done, what is under way, what failed. Everything the command line says of a run, it reads here.

results/jobs/<key>/                                     artifact of a finished job; appears whole or not at all
results/work/<key>/                                     a job under way: job.json, checkpoint, submitted.json, progress.json, failure.json
results/logs/<key>/                                     what its processes printed, and the lock that the one at work holds
results/runs/<time>-<id>.json                           what a `bench run` asked for; <time>-<id>.lock is held while it runs
results/<protocol>/<track>/<method>/seed-<n>/step-<t>   links for people, and the index of reports
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.errors import UserError

RESULTS_VARIABLE = "CISS_BENCH_RESULTS"
RESERVED = ("jobs", "work", "logs", "runs", "smoke", "published")
STALE_SECONDS = 300.0
"""A job that has not reported for this long from another machine, whose locks may be invisible here, counts as interrupted."""

ASKING_SECONDS = 1.0
"""Who is in the way of a lock for less than this only asked whether it is held."""

STATES = ("done", "running", "submitted", "failed", "interrupted", "waiting")


@dataclass(frozen=True)
class JobState:
    """What is known of a job.

    Attributes:
        state: "done": its artifact is there; "running": a process is at work on it; "submitted": handed to an executor, whose process has
            not begun; "failed": its last attempt ended in an error; "interrupted": its process is gone without a word, it can be resumed;
            "waiting": nothing was tried.
        progress, failure, submission: what its process last reported, what stopped it, and to whom it was handed; empty if nothing.
    """

    state: str
    progress: Mapping[str, Any]
    failure: Mapping[str, Any]
    submission: Mapping[str, Any]


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if it is not there; UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged: {error}; delete it and run again") from None


def check_writable(folder: Path) -> None:
    """Make a folder and write into it; OSError if that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.write_text("")
    probe.unlink()


@contextlib.contextmanager
def hold(lock: Path) -> Iterator[None]:
    """Hold a lock, waiting until nobody else does. It goes when the process goes, however that ends."""
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    file = FileLock(lock)
    try:
        try:
            file.acquire(timeout=ASKING_SECONDS)
        except Timeout:
            print(f"another process holds {lock}; waiting for it", flush=True)
            file.acquire(poll_interval=0.5)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(f"WARNING: {lock}: no locks on this file system; do not start the same run twice at once", flush=True)
        yield
    finally:
        file.release()


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock; as many as like may ask at once, and none of them disturbs who wants to hold it."""
    try:
        file = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(file)
    return False


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
            raise UserError(f"results folder {self.root}: cannot be written ({error.strerror}); choose another with --results DIR") from None

    # ---- artifacts -----------------------------------------------------------------------------------------------------

    def artifact(self, key: str) -> Path:
        return self.root / "jobs" / key

    def done(self, key: str) -> bool:
        """Whether a finished artifact is there; it may be an older one than the job under way will leave (--force)."""
        return (self.artifact(key) / "metrics.json").is_file()

    def publish(self, key: str, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, then move it into place in one step; an older artifact makes room first."""
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

    # ---- work under way ------------------------------------------------------------------------------------------------

    def work(self, key: str) -> Path:
        return self.root / "work" / key

    def logs(self, key: str) -> Path:
        return self.root / "logs" / key

    def open_work(self, key: str, job: Mapping[str, Any], fresh: bool = False) -> Path:
        """The work folder of a job about to be submitted; `fresh` throws away what an earlier attempt left."""
        folder = self.work(key)
        if fresh:
            self.clear_work(key)
        folder.mkdir(parents=True, exist_ok=True)
        self.withdraw(key)
        (folder / "failure.json").unlink(missing_ok=True)
        write_json(folder / "job.json", job)
        return folder

    def lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        """The right to work on a job: only one process has it at a time, so no job is ever trained twice at once."""
        return hold(self.logs(key) / "lock")

    def clear_failure(self, key: str) -> None:
        (self.work(key) / "failure.json").unlink(missing_ok=True)

    def report_progress(self, key: str, **values: Any) -> None:
        write_json(self.work(key) / "progress.json", {"host": socket.gethostname(), "pid": os.getpid(), "updated": time.time(), **values})

    def note_submission(self, key: str, **values: Any) -> None:
        """Note to whom a job was handed; a job that is over already has no folder any more."""
        with contextlib.suppress(FileNotFoundError):
            write_json(self.work(key) / "submitted.json", {"host": socket.gethostname(), **values})

    def withdraw(self, key: str) -> None:
        """Forget that a job was submitted or made progress; what it needs to be resumed stays."""
        for name in ("submitted.json", "progress.json"):
            (self.work(key) / name).unlink(missing_ok=True)

    def report_failure(self, key: str, error: str, log: str) -> None:
        """Note why a job stopped. The first cause stays: of processes that train together, the others fail because one did."""
        path = self.work(key) / "failure.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"error": error, "log": log, "when": time.time()})

    def state(self, key: str) -> JobState:
        """What the folder says of a job, whoever started it."""
        found = self._look(key)
        return self._look(key) if found.state == "interrupted" else found  # it may have begun while it was looked at

    def _look(self, key: str) -> JobState:
        """What the folder says of a job now.

        The lock is looked at first: a process leaves its artifact or its failure before it lets go, so once the lock is free, the files
        that are read after it are final.
        """
        held = is_held(self.logs(key) / "lock")
        folder = self.work(key)
        failure, progress, submission = (read_json(folder / name) or {} for name in ("failure.json", "progress.json", "submitted.json"))
        if failure:
            state = "failed"
        elif held or _reports_from_elsewhere(progress):
            state = "running"
        elif not (folder / "job.json").is_file():
            state = "done" if self.done(key) else "waiting"
        elif progress or _ended_early(submission):
            state = "interrupted"
        else:
            state = "submitted" if submission else "waiting"
        return JobState(state, progress, failure, submission)

    def keys(self) -> set[str]:
        """Jobs of which there is an artifact or a work folder; the state of any other is "waiting"."""
        return {path.name for name in ("jobs", "work") if (self.root / name).is_dir() for path in (self.root / name).iterdir()}

    def clear_work(self, key: str) -> None:
        """Remove the work folder of a job that is over; for a reader it is there or gone, never half."""
        aside = self.root / "work" / f".{key}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            self.work(key).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    # ---- runs and links ------------------------------------------------------------------------------------------------

    def record_run(self, run: Mapping[str, Any]) -> str:
        """Note what a `bench run` asked for, so that status and resume need no running driver. Returns the run's name."""
        name = f"{datetime.now():%Y%m%d-%H%M%S-%f}-{os.getpid()}"
        write_json(self.root / "runs" / f"{name}.json", run)
        return name

    def driving(self, run: str) -> contextlib.AbstractContextManager[None]:
        """Held by the driver of a run as long as it lives."""
        return hold(self.root / "runs" / f"{run}.lock")

    def is_driven(self, run: str) -> bool:
        """Whether the driver of a run is still there."""
        return is_held(self.root / "runs" / f"{run}.lock")

    def runs(self) -> list[dict[str, Any]]:
        """All recorded runs, oldest first, each with its "name"."""
        folder = self.root / "runs"
        found = [(path.stem, read_json(path)) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
        return [{"name": name, **run} for name, run in found if run]

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

    def links(self) -> Iterator[tuple[str, str, str, int, int, Path]]:
        """(protocol, track, method, seed, step, artifact) of every finished result."""
        if not self.root.is_dir():
            return
        for top in sorted(self.root.iterdir()):
            if top.name in RESERVED or top.name.startswith(".") or not top.is_dir():
                continue
            for link in sorted(top.glob("*/*/seed-*/step-*")):
                if (link / "metrics.json").is_file():
                    track, method, seed, step = link.relative_to(top).parts
                    yield top.name, track, method, int(seed.removeprefix("seed-")), int(step.removeprefix("step-")), link


def _reports_from_elsewhere(progress: Mapping[str, Any]) -> bool:
    """Whether a job on another machine, whose lock this one may not see, reported lately."""
    return bool(progress) and progress["host"] != socket.gethostname() and time.time() - progress["updated"] < STALE_SECONDS


def _ended_early(submission: Mapping[str, Any]) -> bool:
    """Whether a job was handed to a process of this machine that is gone before it began."""
    return submission.get("host") == socket.gethostname() and "pid" in submission and not is_alive(submission["pid"])


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and that nobody asked about does not."""
    try:
        os.kill(pid, 0)
        return not Path("/proc/self").exists() or bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except PermissionError:
        return True
    except OSError:
        return False
