"""What a SLURM cluster says of this user's jobs.

The queue is asked, not the accounting, so it works on clusters without it.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from typing import NamedTuple

ANSWER_SECONDS = 60.0
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
)  # fmt: skip
"""States of jobs that are over; the queue shows them for some minutes."""


class Queued(NamedTuple):
    """A job as the queue shows it: its state ("PENDING", "RUNNING", …), and why it waits or ""."""

    state: str
    reason: str


class QueueError(Exception):
    """SLURM did not say; it may be asked again."""


def queue() -> dict[str, Queued]:
    """This user's SLURM jobs by id, the lately ended ones included.

    Raises:
        QueueError: no SLURM here, or none that answers.
    """
    command = ["squeue", "-h", "-u", pwd.getpwuid(os.getuid()).pw_name, "-t", "all", "-o", "%i|%T|%r"]
    try:  # in a session of its own: Ctrl-C is for who asks, not for the question
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=ANSWER_SECONDS,
            start_new_session=True,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise QueueError(f"squeue: {error}") from None
    if answer.returncode:
        raise QueueError(f"squeue: {' '.join(answer.stderr.split())}")
    rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 2]
    return {job_id: Queued(state, "" if reason == "None" else reason) for job_id, state, reason in rows}
