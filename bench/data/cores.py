"""How many processors this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Those that the job was given; all of the machine where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
