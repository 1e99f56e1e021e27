"""`bench doctor`: what runs need of this machine, asked before they need it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.doctor.finding import Finding

__all__ = ["Finding", "examine"]


def examine(data_root: str | Path | None = None, results: str | Path | None = None) -> Iterator[Finding]:
    """Look at everything that a run needs, one thing after the other.

    Args:
        data_root: where one of the data sets is said to be.
        results: the results folder; None: the usual one.
    """
    from bench.doctor.packages import installed

    yield from installed()
    try:
        from bench.doctor.checks import surroundings
    except ImportError as error:  # the packages' line says it too
        yield Finding("the rest", "fail", f"cannot be looked at: {error}", "mend the packages first")
        return
    yield from surroundings(data_root, results)
