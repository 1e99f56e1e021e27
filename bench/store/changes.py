"""Finished jobs held against the installed code: which files have changed since they ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench import provenance
from bench.store.records import Environment, read_record
from bench.store.results import Store

NAMED = 3
"""At most as many files are named in a line."""


def changed_files(ran: Environment) -> tuple[str, ...]:
    """Files of the job's method, and of its recorders, that are not what they were; () if that is not known.

    A package that is gone has changed nothing: there is nothing to run again.
    """
    known = ran.code.files()
    return tuple(file for file in sorted(known) if provenance.installed(file) not in (known[file], None))


def changed_jobs(store: Store, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Of the finished ones of some jobs, those whose code has changed: files by key."""
    found = {}
    for key in dict.fromkeys(keys):
        ran = read_record(store.artifact(key) / Environment.file, Environment)
        if ran is not None and (files := changed_files(ran)):
            found[key] = files
    return found


def changed_line(changed: Mapping[str, Sequence[str]]) -> str:
    """One line about jobs whose code has changed, by key; "" if there are none."""
    files = sorted({file for files in changed.values() for file in files})
    if not files:
        return ""
    have, which = ("has", "its") if len(files) == 1 else ("have", "their")
    jobs = f"{len(changed)} of these jobs ran"
    return f"{listed(files)} {have} changed since {jobs}: --force, or raise {which} version"


def listed(files: Sequence[str]) -> str:
    """Files in words; of many, the first."""
    more = len(files) - NAMED
    return ", ".join(files[:NAMED]) + (f" and {more} more" if more > 0 else "")


def changed_engine(ran: Environment) -> list[str]:
    """Parts of the engine that are not what they were; [] if that is not known."""
    now = provenance.engine()
    return [part for part, before in sorted(ran.code.engine.items()) if now.get(part, before) != before]
