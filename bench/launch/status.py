"""What is done, running, failed, as data: from the results folder, and SLURM's queue for what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue

from bench.launch.queue import ENDED, Queued, QueueError, queue
from bench.launch.siblings import under_way
from bench.store.changes import NOTHING_CHANGED, Change, changes
from bench.store.records import Failure, Progress
from bench.store.results import JobState, Store


@dataclass(frozen=True)
class JobStatus:
    """A job of a run.

    Attributes:
        key: of the job.
        places: where results link to it.
        state: a word of bench.store.results.STATES.
        progress, failure: what its process last said, and what stopped it.
        leader: key of the sibling whose training it shares, while that is under way, or None.
        change: what has changed since it ran, if it is done.
        slurm, slurm_state, slurm_reason: id of its SLURM job, what the queue says, and why it waits, or None.
    """

    key: str
    places: tuple[str, ...]
    state: str
    progress: Progress | None = None
    failure: Failure | None = None
    leader: str | None = None
    change: Change = NOTHING_CHANGED
    slurm: str | None = None
    slurm_state: str | None = None
    slurm_reason: str | None = None

    def as_json(self) -> dict[str, JsonValue]:
        """For machines; what is not known is left out."""
        values: dict[str, JsonValue] = {"key": self.key, "places": list(self.places), "state": self.state}
        for name in ("progress", "failure"):
            record: Progress | Failure | None = getattr(self, name)
            values[name] = record.model_dump(mode="json") if record else None
        for name, changed in (("changed", self.change.files), ("engine_changed", self.change.engine)):
            if changed:
                values[name] = list(changed)
        for name in ("leader", "slurm", "slurm_state", "slurm_reason"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        return values


def status_data(store: Store, every_run: bool = False) -> list[JobStatus]:
    """One row a job of the last run, or of all."""
    runs = store.runs() if every_run else store.runs()[-1:]
    places: dict[str, list[str]] = {}
    for run in runs:
        for chain in run.record.chains:
            for key, place in zip(chain.keys, chain.places, strict=True):
                if place not in places.setdefault(key, []):
                    places[key].append(place)
    states = {key: store.state(key) for key in places}
    led = under_way(store) if any(state.state == "waiting" for state in states.values()) else {}
    leaders = {key: led[key] for key, state in states.items() if state.state == "waiting" and key in led}
    states |= {key: store.state(leader) for key, leader in leaders.items()}
    for key in [key for key in leaders if states[key].state == "done"]:  # it ended while we looked
        del leaders[key]
        states[key] = store.state(key)
    queued = _queue(states.values())
    changed = changes(store, (key for key, now in states.items() if now.state == "done"))
    rows = []
    for key, now in states.items():
        row = JobStatus(
            key, tuple(places[key]), now.state, now.progress, now.failure, leaders.get(key),
            changed.get(key, NOTHING_CHANGED),
        )  # fmt: skip
        rows.append(_in_queue(row, now, queued))
    return rows


def is_driven(store: Store) -> bool:
    """Whether the driver of the last run is still there."""
    return any(store.is_driven(run.name) for run in store.runs()[-1:])


def counted(rows: Sequence[JobStatus], words: Iterable[str]) -> dict[str, int]:
    """How many jobs are in each state, in the order of the words, states without any left out."""
    return {word: n for word in words if (n := sum(row.state == word for row in rows))}


def _queue(states: Iterable[JobState]) -> Mapping[str, Queued] | None:
    """SLURM's queue, if a job was handed to it and it answers."""
    if not any(known.submission and known.submission.cluster == "slurm" for known in states):
        return None
    try:
        return queue()
    except QueueError:
        return None


def _in_queue(row: JobStatus, known: JobState, queued: Mapping[str, Queued] | None) -> JobStatus:
    """With what the queue adds to what the files say.

    A job that was put back into it waits, one that left it does not run.
    """
    submission = known.submission
    if queued is None or submission is None or submission.cluster != "slurm" or submission.id is None:
        return row
    if known.state not in ("submitted", "running", "interrupted"):
        return row
    found = queued.get(submission.id)
    if found is None or found.state in ENDED:
        state = "interrupted" if known.progress else "waiting"
        return replace(row, slurm=submission.id, slurm_state=found.state if found else "gone", state=state)
    state = known.state
    if found.state == "RUNNING":
        state = "running"
    elif known.state == "interrupted":
        state = "submitted"
    return replace(row, slurm=submission.id, slurm_state=found.state, slurm_reason=found.reason, state=state)
