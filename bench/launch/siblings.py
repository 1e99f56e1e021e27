"""Siblings: jobs of one training, which differ in what is recorded. One leads, the others ride along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bench.files import read_json
from bench.plan.plan import Plan
from bench.store.records import JobRecord, parse_record
from bench.store.results import JobState, Store


def shared_training(plan: Plan, key: str, wanted: Sequence[str]) -> tuple[str, list[str]]:
    """(who leads, who rides along) when a job is trained together with those of some others that it can be.

    The one that asks for most records leads: interrupted, its checkpoint serves all again.
    """
    together = [key, *plan.served_together(key, wanted)]
    leader = max(together, key=lambda other: len(plan.jobs[other].inputs.records))
    return leader, [other for other in together if other != leader]


def source_of(plan: Plan, key: str, done: Callable[[str], bool]) -> str | None:
    """A done sibling whose artifact holds all that a job's would, so that the job needs no training."""
    siblings = plan.siblings(key)
    if len(siblings) == 1:
        return None
    return next(
        (other for other in siblings if other != key and plan.yields(other, key) and done(other)), None
    )


def leaders(plan: Plan, keys: Iterable[str]) -> dict[str, str]:
    """Who of some jobs that are to be trained rides along with whom."""
    left = dict.fromkeys(keys)
    riding: dict[str, str] = {}
    for key in list(left):
        siblings = plan.siblings(key)
        if key in left and len(siblings) > 1:
            leader, riders = shared_training(plan, key, [other for other in siblings if other in left])
            riding |= dict.fromkeys(riders, leader)
            for other in (leader, *riders):
                del left[other]
    return riding


def under_way(store: Store) -> dict[str, str]:
    """Leader by rider, of all that is under way in a results folder, whoever started it."""
    folder = store.root / "work"
    found: dict[str, str] = {}
    for path in sorted(folder.glob(f"[!.]*/{JobRecord.file}")) if folder.is_dir() else ():
        content = read_json(path)  # None: it is over meanwhile
        if isinstance(content, dict) and content.get("also"):
            record = parse_record(content, JobRecord, str(path))
            found |= {other.key: record.key for other in record.also}
    return found


def standing(store: Store, key: str, led: dict[str, str]) -> JobState:
    """What the results folder says of a job; of one that rides along, what it says of its leader."""
    state = store.state(key)
    return store.state(led[key]) if state.state == "waiting" and key in led else state
