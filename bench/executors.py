"""Where jobs run: in this process, on this machine, or on a SLURM cluster. Processes are started through submitit."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import submitit
from submitit.local.local import LocalJob

from bench import shipped
from bench.cluster import ENDED, Profile, Queued, QueueError, queue
from bench.errors import UserError
from bench.plan import Job
from bench.store import JobState, Store

STOP_SECONDS = 5.0
"""How long a process of this machine has to end by itself when it is stopped."""
FOREVER_MINUTES = 60 * 24 * 365
GONE = Queued("gone from the queue", "")
LAG_SECONDS = {"COMPLETED": 60.0, "FAILED": 10.0, GONE.state: 60.0}
"""How long after a SLURM job ended its files may take to show here: network file systems lag. A job that was cut off leaves none."""
WAITING = ("CONFIGURING", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED")
"""States in which the queue holds a job back."""


class StepCall:
    """What a job's process runs. Asked to checkpoint (time limit, preemption), it is put back into the queue and resumes."""

    def __init__(self, results: str, key: str) -> None:
        self.results, self.key = results, key

    def __call__(self) -> None:
        from bench.step import run_job

        run_job(self.results, self.key, log=str(submitit.JobEnvironment().paths.stdout))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self)


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
        """Start a job, its work folder being there. `parent` is the key of a parent that is not done yet."""
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
        return str(self.store.state(key).submission.get("log", ""))

    def cancel(self, keys: Iterable[str]) -> list[str]:
        """Stop those of these jobs that it started; returns those that go on, because others started them."""
        return [key for key in keys if self.store.state(key).state == "running"]


class Inline(Executor):
    """In this process, one after the other: for a debugger."""

    in_process = True

    def submit(self, job: Job, parent: str | None) -> None:
        from bench.step import run_job

        try:
            run_job(str(self.store.root), job.key)
        except Exception:  # written down, and printed: the driver reads it there
            return

    def ended(self, key: str) -> str | None:
        return None if self.store.state(key).state == "running" else "it ended without a result"


# ---- this machine --------------------------------------------------------------------------------------------------------


class LocalExecutor(submitit.LocalExecutor):
    """submitit's local executor with the job as its direct child, in a session of its own.

    submitit puts a controller between, which hides the job's exit status, shares the terminal (so that Ctrl-C reaches everything at once
    and each process prints its traceback), and leaves the job behind when it is killed.
    """

    def _submit_command(self, command: str) -> LocalJob[Any]:
        job_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        place = {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": job_id,
            "SUBMITIT_LOCAL_NTASKS": "1",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_GLOBALID": "0",
            "SUBMITIT_LOCAL_LOCALID": "0",
        }
        log = submitit.core.utils.JobPaths(self.folder, job_id).stdout
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                shlex.split(command), env={**os.environ, **self.parameters["environment"], **place},
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        return LocalJob(self.folder, job_id, process=self.process)


class Local(Executor):
    """On this machine, some at a time, one GPU each where there are GPUs."""

    def __init__(self, store: Store, slots: int, gpus: Sequence[str]) -> None:
        super().__init__(store)
        self.slots, self.gpus = slots, gpus
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._adopted: dict[str, JobState] = {}
        self._orphans: dict[str, int] = {}
        self._gpu_of: dict[str, str] = {}

    def submit(self, job: Job, parent: str | None) -> None:
        executor = LocalExecutor(self.store.logs(job.key))
        executor.update_parameters(timeout_min=FOREVER_MINUTES, environment=self._environment(job.key))
        started = executor.submit(StepCall(str(self.store.root.resolve()), job.key))
        self._started[job.key] = executor.process
        gpu, log = self._gpu_of.get(job.key), str(started.paths.stdout)
        self.store.note_submission(job.key, run=self.run, cluster="local", pid=executor.process.pid, gpu=gpu, log=log)

    def _environment(self, key: str) -> dict[str, str]:
        """Threads and GPU of a job."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.slots)
        if self.gpus:
            busy = [gpu for other, gpu in self._gpu_of.items() if self.ended(other) is None]
            self._gpu_of[key] = min(self.gpus, key=busy.count)
        return {**process_environment(threads), "CUDA_VISIBLE_DEVICES": self._gpu_of.get(key, "")}

    def adopt(self, key: str, state: JobState) -> bool:
        if state.state != "running":
            return False
        self._adopted[key], submission = state, state.submission
        if submission.get("cluster") == "local" and submission["host"] == socket.gethostname():
            if submission["gpu"] in self.gpus:
                self._gpu_of[key] = submission["gpu"]
            if not self.store.is_driven(submission["run"]):
                self._orphans[key] = submission["pid"]
        return True

    def ended(self, key: str) -> str | None:
        if key in self._started:
            status = self._started[key].poll()
            return None if status is None else f"its process ended with status {status} without a result"
        if self.store.state(key).state == "running":
            return None
        progress = self._adopted[key].progress
        return f"its process {progress.get('pid', '')} on {progress.get('host', 'this machine')} ended without a result"

    def cancel(self, keys: Iterable[str]) -> list[str]:
        """Ask its processes to stop, then make them; those that a driver left which is gone are its own too."""
        mine = {**{key: process.pid for key, process in self._started.items()}, **self._orphans}
        going_on = [key for key in keys if self.ended(key) is None]
        running = {mine[key]: key for key in going_on if key in mine}
        for pid in running:
            os.kill(pid, signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        while any(self.ended(key) is None for key in running.values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in running:  # what a job started is in its session: loaders of a process that is gone too
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for key in running.values():
            if key in self._started:
                self._started[key].wait()
        return [key for key in going_on if key not in mine]


def process_environment(threads: int) -> dict[str, str]:
    """The environment of jobs: their threads, this very package, and no module of the current folder in its way."""
    values = {"BENCH_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
    here = shipped.PACKAGE.parent
    if here.name not in ("site-packages", "dist-packages"):  # a checkout
        values["PYTHONPATH"] = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    return values


def visible_gpus() -> list[str]:
    """GPUs of this machine as CUDA_VISIBLE_DEVICES names them, found without torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in answer.stdout.splitlines()))]


def default_slots(gpus: Sequence[str]) -> int:
    """Jobs at once on this machine: one a GPU; without GPUs up to four, sharing the cores."""
    return len(gpus) or min(4, len(os.sched_getaffinity(0)))


# ---- SLURM ---------------------------------------------------------------------------------------------------------------


class Slurm(Executor):
    """One SLURM job a step, each after its parent (afterok): the cluster queues, this process only watches.

    Nothing here asks sacct, and so nothing uses submitit's job states.
    """

    queues = True

    def __init__(self, store: Store, profile: Profile) -> None:
        super().__init__(store)
        if shutil.which("sbatch") is None:
            raise UserError("--cluster slurm: no sbatch on this machine; log in to a submit node, or use --cluster local")
        self.profile = profile
        self.slots, self.poll_seconds, self.processes = profile.max_queued, profile.poll_seconds, max(1, profile.gpus)
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
            raise UserError(f"sbatch refused {job.method} step {job.step}: {' '.join(str(error).split())[-400:]}") from None
        self._ids[job.key] = submitted.job_id
        self._started.add(job.key)
        self._queue[submitted.job_id] = Queued("PENDING", "")
        self.store.note_submission(job.key, run=self.run, cluster="slurm", id=submitted.job_id, log=str(submitted.paths.stdout))

    def parameters(self, job: Job, after: str | None) -> dict[str, Any]:
        """What submitit is told of a job; `after` is the id of the job that it needs."""
        p = self.profile
        environment = process_environment(p.cpus)
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
            "setup": [*p.setup, *(f"export {name}={shlex.quote(value)}" for name, value in environment.items())],
            "srun_args": [f"--cpus-per-task={p.cpus}", "--kill-on-bad-exit=1"],  # srun takes neither from the job
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
        if state.submission.get("cluster") != "slurm":
            return super().adopt(key, state)
        job_id = state.submission["id"]
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
                subprocess.run([*command, *concerned], check=False, capture_output=True, start_new_session=True)
        return [key for key in keys if key not in self._started and self.ended(key) is None]


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """The environment for a submission: what a SLURM job around this process set for itself is not for others."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    configuration = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(configuration)
        yield
