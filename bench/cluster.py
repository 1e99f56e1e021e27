"""What a SLURM cluster is asked for (profiles) and what it says (its queue)."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench import shipped
from bench.errors import UserError, unknown
from bench.recipe import read_toml


class Profile(BaseModel):
    """What `bench run --cluster slurm` asks for, for each step: a file slurm/<name>.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    partition: str = ""
    """Where jobs run; "" for the cluster's default."""
    account: str = ""
    """Who pays; "" for the user's default."""
    qos: str = ""
    """Quality of service; "" for the default."""
    time_min: int = Field(1440, ge=1)
    """Minutes; a step that needs more is put back into the queue and resumes from its last epoch."""
    gpus: int = Field(1, ge=0)
    """GPUs of a step, with one process each; batch_size is shared among them. 0: one process on the CPU."""
    cpus: int = Field(8, ge=1)
    """CPUs of each process."""
    mem_gb: float = Field(48, gt=0)
    """Memory of the machine's share, in gigabytes."""
    setup: tuple[str, ...] = ()
    """Shell commands before each step, for example "module load cuda"."""
    sbatch: dict[str, str | int | float | bool] = {}
    """Any other option of sbatch, for example constraint = "a100"."""
    poll_seconds: float = Field(10, gt=0)
    """How often the queue is asked."""
    max_queued: int = Field(1000, ge=1)
    """Jobs in the queue at once; the others follow as these end."""


def profile_names() -> list[str]:
    """Every shipped profile."""
    return sorted(path.stem for path in shipped.folder("slurm").glob("*.toml"))


def load_profile(name: str | None) -> Profile:
    """A cluster profile by name (slurm/<name>.toml) or path.

    Raises:
        UserError: no such profile, an unknown key, or a value that is not allowed.
    """
    name = name or "default"
    path = Path(name) if name.endswith(".toml") else shipped.folder("slurm") / f"{name}.toml"
    if not path.is_file():
        raise unknown("profile", name, profile_names(), where="--profile")
    values = read_toml(path)
    for key in values:
        if key not in Profile.model_fields:
            raise unknown("key", key, Profile.model_fields, where=str(path))
    try:
        return Profile(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {first['loc'][0]} = {first['input']!r}: {first['msg']}") from None


class Queued(NamedTuple):
    """A job as the queue shows it: its state ("PENDING", "RUNNING", "CANCELLED", …) and why it waits, "" if it does not."""

    state: str
    reason: str


ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
"""States of jobs that are over; the queue shows them for some minutes."""


ANSWER_SECONDS = 60.0


class QueueError(Exception):
    """SLURM did not say; it may be asked again."""


def queue() -> dict[str, Queued]:
    """This user's SLURM jobs by id, the lately ended ones included.

    The queue is asked, not the accounting, so it works on clusters without it.

    Raises:
        QueueError: no SLURM here, or none that answers.
    """
    command = ["squeue", "-h", "-u", pwd.getpwuid(os.getuid()).pw_name, "-t", "all", "-o", "%i|%T|%r"]
    try:  # in a session of its own: Ctrl-C is for who asks, not for the question
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS, start_new_session=True)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise QueueError(f"squeue: {error}") from None
    if answer.returncode:
        raise QueueError(f"squeue: {' '.join(answer.stderr.split())}")
    rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 2]
    return {job_id: Queued(state, "" if reason == "None" else reason) for job_id, state, reason in rows}
