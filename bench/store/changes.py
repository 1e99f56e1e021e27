"""Finished jobs held against the installed code: what has changed since they ran."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench import provenance
from bench.errors import UserError
from bench.store.records import Environment, read_record
from bench.store.results import Store

NAMED = 3
"""At most as many files are named in a line."""


class Change(NamedTuple):
    """What is not as it was when a job ran: files of its method and recorders, parts of the engine."""

    files: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()


NOTHING_CHANGED = Change()


def change(ran: Environment) -> Change:
    """What has changed since a job ran; nothing where its code is not known.

    A package that is gone has changed nothing: there is nothing to run again.
    """
    known, engine = ran.code.files(), ran.code.engine
    now = provenance.engine() if engine else {}
    return Change(
        tuple(file for file in sorted(known) if provenance.installed(file) not in (known[file], None)),
        tuple(part for part in sorted(engine) if now.get(part, engine[part]) != engine[part]),
    )


def changes(store: Store, keys: Iterable[str]) -> dict[str, Change]:
    """What has changed since each of some finished jobs ran, by key; jobs that do not tell are left out."""
    found = {}
    for key in keys:
        try:
            ran = read_record(store.artifact(key) / Environment.file, Environment)
        except UserError:  # damaged, which is no reason to say nothing of the others; reports name it
            continue
        if ran is not None:
            found[key] = change(ran)
    return found


def change_lines(of_jobs: Iterable[Change]) -> list[str]:
    """A line about changed methods, a quieter one about the engine; none where there is nothing to say."""
    jobs = list(of_jobs)
    lines = [files_line([job.files for job in jobs], "these"), engine_line([job.engine for job in jobs])]
    return [line for line in lines if line]


def files_line(of_jobs: Iterable[Sequence[str]], whose: str) -> str:
    """ "methods/mib.py has changed since 3 of these jobs ran: --force, or raise its version"; or ""."""
    changed = [files for files in of_jobs if files]
    names = _named(changed)
    which = "its version" if len(names) == 1 else "their versions"
    since = f"{_have_changed(names)} since {len(changed)} of {whose} jobs ran"
    return f"{since}: --force, or raise {which}" if changed else ""


def engine_line(of_jobs: Iterable[Sequence[str]]) -> str:
    """ "the engine is not quite what 3 of these jobs ran with: bench/train has changed"; or ""."""
    changed = [parts for parts in of_jobs if parts]
    said = _have_changed(_named(changed))
    return f"the engine is not quite what {len(changed)} of these jobs ran with: {said}" if changed else ""


def listed(names: Sequence[str]) -> str:
    """Files in words; of many, the first."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _named(of_jobs: Iterable[Sequence[str]]) -> list[str]:
    return sorted({name for names in of_jobs for name in names})


def _have_changed(names: Sequence[str]) -> str:
    return f"{listed(names)} {'has' if len(names) == 1 else 'have'} changed"
