"""Where jobs run: the interface, and the simplest executor, this very process. Others: local.py, slurm.py."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bench import shipped
from bench.plan.plan import Job
from bench.store.results import JobState, Store

if TYPE_CHECKING:
    import submitit

FOREVER_MINUTES = 60 * 24 * 365
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class StepCall:
    """What a job's process runs.

    Asked to checkpoint (time limit, preemption), it is put back into the queue and resumes.
    """

    def __init__(self, results: str, key: str) -> None:
        self.results, self.key = results, key

    def __call__(self) -> None:
        import submitit

        from bench.train.job import run_job

        run_job(self.results, self.key, log=str(submitit.JobEnvironment().paths.stdout))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def process_environment(threads: int) -> dict[str, str]:
    """The environment of a job: its threads, this package, and no module of the current folder in its way."""
    values = {**dict.fromkeys(THREADS, str(threads)), "PYTHONSAFEPATH": "1"}
    here = shipped.PACKAGE.parent
    if here.name not in ("site-packages", "dist-packages"):  # a checkout
        values["PYTHONPATH"] = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    return values


class Executor:
    """Where jobs run.

    Attributes:
        store: the results folder.
        run: name of the run that submits; written beside each submission.
        slots: how many jobs it takes at once.
        queues: what it took goes on without this process.
        in_process: a job runs within `submit`.
        processes: that train one job together and share its batches.
        poll_seconds: how often it is worth looking at.
    """

    slots: int = 1
    queues: bool = False
    in_process: bool = False
    processes: int = 1
    poll_seconds: float = 0.25

    def __init__(self, store: Store) -> None:
        self.store = store
        self.run = ""

    def submit(self, job: Job, parent: str | None) -> None:
        """Start a job whose work folder is there. `parent`: key of a submitted job that it comes after."""
        raise NotImplementedError

    def takes_after(self, parent: str) -> bool:
        """Whether a job can be submitted while its parent, which was submitted, is not done."""
        return False

    def adopt(self, key: str, state: JobState) -> bool:
        """Take over a job that another driver started, if it is under way."""
        return state.state == "running"

    def look(self) -> None:
        """Find out how things stand; what `ended` and `waits` answer is as of the last look."""

    def waits(self, key: str) -> str:
        """Why a submitted job does not run yet; "" if nothing is known to hold it."""
        return ""

    def ended(self, key: str) -> str | None:
        """None while a job may still run, else how it ended, in words."""
        raise NotImplementedError

    def log(self, key: str) -> str:
        """Where a job's output is."""
        submission = self.store.state(key).submission
        return submission.log if submission else ""

    def cancel(self, keys: Iterable[str]) -> list[str]:
        """Stop those of these jobs that it started; returns those that go on, because others started them."""
        return [key for key in keys if self.store.state(key).state == "running"]


class Inline(Executor):
    """In this process, one after the other: for a debugger."""

    in_process = True

    def submit(self, job: Job, parent: str | None) -> None:
        from bench.train.job import run_job

        try:
            run_job(str(self.store.root), job.key)
        except Exception:  # written down, and printed: the driver reads it there
            return

    def ended(self, key: str) -> str | None:
        return None if self.store.state(key).state == "running" else "it ended without a result"
