"""On this machine: each job a process of its own, started through submitit."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.local.local import LocalJob

from bench.data.cores import cores
from bench.launch.executor import FOREVER_MINUTES, Executor, StepCall, process_environment
from bench.plan.plan import Job
from bench.store.results import JobState, Store

STOP_SECONDS = 5.0
"""How long a process of this machine has to end by itself when it is stopped."""
JOB_BYTES = 2 * 2**30
"""Memory that a job on a CPU counts as."""
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


class LocalExecutor(submitit.LocalExecutor):
    """submitit's local executor with the job as its direct child, in a session of its own.

    submitit puts a controller between, which hides the job's exit status, shares the terminal (so that Ctrl-C
    reaches everything at once and each process prints its traceback), and leaves the job behind when killed.
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
        executor.update_parameters(timeout_min=FOREVER_MINUTES, environment=self._environment(job))
        started = executor.submit(StepCall(str(self.store.root.resolve()), job.key))
        self._started[job.key] = executor.process
        gpu, log, pid = self._gpu_of.get(job.key), str(started.paths.stdout), executor.process.pid
        self.store.note_submission(job.key, run=self.run, cluster="local", pid=pid, gpu=gpu, log=log)

    def _environment(self, job: Job) -> dict[str, str]:
        """Threads and GPU of a job."""
        if self.gpus:
            busy = [gpu for other, gpu in self._gpu_of.items() if self.ended(other) is None]
            self._gpu_of[job.key] = min(self.gpus, key=busy.count)
        return {
            **process_environment(job.config.threads),
            "CUDA_VISIBLE_DEVICES": self._gpu_of.get(job.key, ""),
        }

    def adopt(self, key: str, state: JobState) -> bool:
        if state.state != "running":
            return False
        self._adopted[key], submission = state, state.submission
        if submission and submission.cluster == "local" and submission.host == socket.gethostname():
            if submission.gpu in self.gpus and submission.gpu:
                self._gpu_of[key] = submission.gpu
            if submission.pid is not None and not self.store.is_driven(submission.run):
                self._orphans[key] = submission.pid
        return True

    def ended(self, key: str) -> str | None:
        if key in self._started:
            status = self._started[key].poll()
            return None if status is None else f"its process ended with status {status} without a result"
        if self.store.state(key).state == "running":
            return None
        progress = self._adopted[key].progress
        which = f"{progress.pid} on {progress.host}" if progress else "on this machine"
        return f"its process {which} ended without a result"

    def cancel(self, keys: Iterable[str]) -> list[str]:
        """Ask its processes to stop, then make them; those of a driver that is gone are its own too."""
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


def visible_gpus() -> list[str]:
    """GPUs of this machine as CUDA_VISIBLE_DEVICES names them, found without torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return [name.strip() for name in names if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in answer.stdout.splitlines()))]


def memory_bytes() -> int | None:
    """Memory of this machine, or of the container around this process; None where it does not say."""
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not everywhere
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        found.append(int(MEMORY_LIMIT.read_text()))
    return min(found, default=None)


def default_slots(gpus: Sequence[str], threads: int = 1) -> int:
    """Jobs at once on this machine: one a GPU; without GPUs as many as cores and memory carry.

    Args:
        gpus: of this machine.
        threads: that a job has.
    """
    if gpus:
        return len(gpus)
    memory = memory_bytes()
    room = cores() if memory is None else memory // JOB_BYTES
    return max(1, min(cores() // threads, room))
