"""Locks: files that one process holds at a time. A lock goes when its process goes, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows; there filelock alone knows
    fcntl = None  # type: ignore[assignment]

ASKING_SECONDS = 1.0
"""Who is in the way of a lock for less than this only asked whether it is held."""


@contextlib.contextmanager
def hold(lock: Path) -> Iterator[None]:
    """Hold a lock, waiting until nobody else does."""
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
            warning = "no locks on this file system; do not start the same run twice at once"
            print(f"WARNING: {lock}: {warning}", flush=True)
        yield
    finally:
        file.release()


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock; as many as like may ask at once, and none of them disturbs who wants to
    hold it."""
    if fcntl is None:
        return False
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


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and that nobody asked about does not."""
    try:
        os.kill(pid, 0)
        return not Path("/proc/self").exists() or bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except PermissionError:
        return True
    except OSError:
        return False
