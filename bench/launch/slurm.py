"""On a SLURM cluster: a SLURM job a step, each after its parent. The cluster queues, this process watches.

Nothing here asks sacct, and so nothing uses submitit's job states.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from typing import Any

import submitit

from bench.errors import UserError
from bench.launch.executor import FOREVER_MINUTES, Executor, StepCall, process_environment
from bench.launch.profile import Profile
from bench.launch.queue import ENDED, Queued, QueueError, queue
from bench.plan.plan import Job
from bench.store.results import JobState, Store

GONE = Queued("gone from the queue", "")
LAG_SECONDS = {"COMPLETED": 60.0, "FAILED": 10.0, GONE.state: 60.0}
"""How long after a SLURM job ended its files may take to show here: network file systems lag. A job that was
cut off leaves none."""
WAITING = (
    "CONFIGURING", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
    "SUSPENDED",
)  # fmt: skip
"""States in which the queue holds a job back."""


class Slurm(Executor):
    """One SLURM job a step, each after its parent (afterok)."""

    queues = True

    def __init__(self, store: Store, profile: Profile) -> None:
        super().__init__(store)
        if shutil.which("sbatch") is None:
            cure = "log in to a submit node, or use --cluster local"
            raise UserError(f"--cluster slurm: no sbatch on this machine; {cure}")
        self.profile = profile
        self.slots, self.poll_seconds, self.processes = (
            profile.max_queued,
            profile.poll_seconds,
            max(1, profile.gpus),
        )
        self._ids: dict[str, str] = {}
        self._started: set[str] = set()
        self._ended_at: dict[str, float] = {}
        try:
            self._queue = queue()
        except QueueError as error:
            raise UserError(f"--cluster slurm: no answer: {error}") from None

    def submit(self, job: Job, parent: str | None) -> None:
        folder = self.store.logs(job.key).resolve()
        executor = submitit.SlurmExecutor(folder, max_num_timeout=FOREVER_MINUTES)
        executor.update_parameters(**self.parameters(job, self._ids.get(parent or "")))
        try:
            with _outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):
                submitted = executor.submit(StepCall(str(self.store.root.resolve()), job.key))
        except RuntimeError as error:  # sbatch's own words say what is wrong
            words = " ".join(str(error).split())[-400:]
            raise UserError(f"sbatch refused {job.method} step {job.step}: {words}") from None
        self._ids[job.key] = submitted.job_id
        self._started.add(job.key)
        self._queue[submitted.job_id] = Queued("PENDING", "")
        log = str(submitted.paths.stdout)
        self.store.note_submission(job.key, run=self.run, cluster="slurm", id=submitted.job_id, log=log)

    def parameters(self, job: Job, after: str | None) -> dict[str, Any]:
        """What submitit is told of a job; `after` is the id of the job that it needs."""
        p = self.profile
        environment = process_environment(job.config.threads)
        more = {name: value for name, value in p.sbatch.items() if value is not False}
        more |= {"requeue": True, "kill-on-invalid-dep": "yes"}
        if after:
            more["dependency"] = f"afterok:{after}"
        named = {name: getattr(p, name) for name in ("partition", "account", "qos") if getattr(p, name)}
        return {
            **named,
            "job_name": f"bench-{job.method}-{job.protocol.name}-{job.step}",
            "time": p.time_min,
            "ntasks_per_node": self.processes,
            "cpus_per_task": p.cpus,
            "mem": f"{round(p.mem_gb * 1024)}M",
            **({"gpus_per_node": p.gpus} if p.gpus else {}),
            "setup": [
                *p.setup,
                *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
            ],
            # srun takes neither from the job
            "srun_args": [f"--cpus-per-task={p.cpus}", "--kill-on-bad-exit=1"],
            "stderr_to_stdout": True,
            "additional_parameters": more,
        }

    def takes_after(self, parent: str) -> bool:
        return parent in self._ids

    def look(self) -> None:
        """Ask the queue; without an answer what was known stays known."""
        with contextlib.suppress(QueueError):
            self._queue = queue()

    def adopt(self, key: str, state: JobState) -> bool:
        if state.submission is None or state.submission.cluster != "slurm":
            return super().adopt(key, state)
        job_id = str(state.submission.id)
        if self._queue.get(job_id, GONE).state in (GONE.state, *ENDED, "COMPLETING"):
            return False
        self._ids[key] = job_id
        return True

    def waits(self, key: str) -> str:
        queued = self._queue.get(self._ids.get(key, ""), GONE)
        return f"{queued.state.lower()} {queued.reason}".strip() if queued.state in WAITING else ""

    def ended(self, key: str) -> str | None:
        if key not in self._ids:  # adopted from a machine
            return None if self.store.state(key).state == "running" else "its process ended without a result"
        how = self._queue.get(self._ids[key], GONE).state
        if how not in (GONE.state, *ENDED):
            self._ended_at.pop(key, None)
            return None
        ended_at = self._ended_at.setdefault(key, time.monotonic())
        late = time.monotonic() - ended_at >= LAG_SECONDS.get(how, 0.0)
        if not late and self.store.state(key).state not in ("done", "failed"):
            return None
        return f"SLURM job {self._ids[key]} ended without a result: {how}"

    def cancel(self, keys: Iterable[str]) -> list[str]:
        """Take its jobs out of the queue; those that run are asked to stop first, which is quicker."""
        keys = list(keys)
        ids = [self._ids[key] for key in keys if key in self._started]
        running = [job_id for job_id in ids if self._queue.get(job_id, GONE).state == "RUNNING"]
        for command, concerned in ((["scancel", "--signal=INT"], running), (["scancel"], ids)):
            if concerned:
                subprocess.run(
                    [*command, *concerned], check=False, capture_output=True, start_new_session=True
                )
        return [key for key in keys if key not in self._started and self.ended(key) is None]


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """The environment for a submission: what a SLURM job around this process set for itself is its own."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    configuration = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(configuration)
        yield
