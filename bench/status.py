"""Live progress of a run, and `bench status`: both read the results folder, nothing else."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from bench.store import STATES, JobState, Store, read_json

if TYPE_CHECKING:
    from bench.cluster import Queued
    from bench.launch import Driver
    from bench.plan import Plan

WATCH_SECONDS = 1.0


def progress_text(progress: Mapping[str, Any]) -> str:
    """ "epoch 3/10, 120/400, loss 0.53, 2 min left"."""
    parts = [str(progress.get("phase", "starting"))]
    if progress.get("epoch"):
        parts.append(f"epoch {progress['epoch']}/{progress['epochs']}")
    if progress.get("iterations"):
        parts.append(f"{progress['iteration']}/{progress['iterations']}")
    if "loss" in progress:
        parts.append(f"loss {progress['loss']:.3f}")
    if "eta" in progress:
        parts.append(f"{duration(progress['eta'])} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "3 min", "2 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


# ---- bench status --------------------------------------------------------------------------------------------------------


def status_data(store: Store, every_run: bool = False) -> list[dict[str, Any]]:
    """One row a job of the last run (or of all): its places, key, state, progress, failure; its SLURM job if it has one."""
    runs = store.runs() if every_run else store.runs()[-1:]
    places: dict[str, list[str]] = {}
    for run in runs:
        for chain in run["chains"]:
            for key, place in zip(chain["keys"], chain["places"], strict=True):
                if place not in places.setdefault(key, []):
                    places[key].append(place)
    states = {key: store.state(key) for key in places}
    queued = _queue(states.values())
    rows = []
    for key, known in states.items():
        row = {"key": key, "places": places[key], "state": known.state, "progress": known.progress, "failure": known.failure}
        if queued is not None and known.submission.get("cluster") == "slurm" and known.state in ("submitted", "running", "interrupted"):
            row |= _in_queue(known, queued)
        rows.append(row)
    return rows


def _queue(states: Any) -> Mapping[str, Queued] | None:
    """SLURM's queue, if a job was handed to it and it answers."""
    if not any(known.submission.get("cluster") == "slurm" for known in states):
        return None
    from bench.cluster import QueueError, queue

    try:
        return queue()
    except QueueError:
        return None


def _in_queue(known: JobState, queued: Mapping[str, Queued]) -> dict[str, Any]:
    """What the queue adds to what the files say: a job that was put back into it waits, one that left it does not run."""
    from bench.cluster import ENDED

    found = queued.get(known.submission["id"])
    if found is None or found.state in ENDED:
        state = "interrupted" if known.progress else "waiting"
        return {"slurm": known.submission["id"], "slurm_state": found.state if found else "gone", "state": state}
    state = "running" if found.state == "RUNNING" else "submitted" if known.state == "interrupted" else known.state
    return {"slurm": known.submission["id"], "slurm_state": found.state, "slurm_reason": found.reason, "state": state}


def status_text(rows: Sequence[Mapping[str, Any]], driven: bool = True) -> str:
    """The rows as a table; `driven`: the run they belong to still has a driver."""
    if not rows:
        return "no run in this results folder"
    table = []
    for row in rows:
        words = [f"SLURM job {row['slurm']} {row['slurm_state'].lower()} {row.get('slurm_reason', '')}".strip()] if "slurm" in row else []
        if row["state"] == "failed":
            words.append(row["failure"]["error"])
        elif row["state"] == "running" or row["progress"]:
            words.append(progress_text(row["progress"]))
        more = f" (+{len(row['places']) - 1})" if len(row["places"]) > 1 else ""
        table.append([row["places"][0] + more, row["key"], row["state"], " ".join(", ".join(words).split())[:160]])
    lines = [tabulate(table, headers=["result", "job", "state", ""], tablefmt="plain", disable_numparse=True)]
    lines.append(", ".join(f"{n} {state}" for state in STATES if (n := sum(row["state"] == state for row in rows))))
    if not driven and any(row["state"] in ("failed", "interrupted", "waiting") for row in rows):
        lines.append("no bench run is at it now: run the same command again to go on")
    return "\n".join(lines)


def is_driven(store: Store) -> bool:
    """Whether the driver of the last run is still there."""
    return any(store.is_driven(run["name"]) for run in store.runs()[-1:])


def watch(store: Store, every_run: bool = False) -> None:
    """Keep showing the status until nothing goes on any more, or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            driven = is_driven(store)
            rows = status_data(store, every_run)
            live.update(Text(status_text(rows, driven), no_wrap=True, overflow="ellipsis"), refresh=True)
            if not driven and not any(row["state"] in ("running", "submitted") for row in rows):
                return
            time.sleep(WATCH_SECONDS)


# ---- the display of bench run --------------------------------------------------------------------------------------------


class Display:
    """Shows a run: live in a terminal, one line an event elsewhere, nothing if not asked for."""

    def __init__(self, plan: Plan, store: Store, live: bool) -> None:
        self.plan, self.store, self.shown = plan, store, live
        self._said: dict[str, str] = {}
        self._live: Any = None
        self._started = time.time()

    def __enter__(self) -> Display:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, value, trace)
            self._live = None

    def say(self, text: str) -> None:
        if not self.shown:
            return
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def name(self, key: str) -> str:
        """A job for people: "voc-15-1 mib seed 0 step 1"; the first of the chains that share it."""
        job = self.plan.jobs[key]
        chain = self.plan.users(key)[0]
        shared = f" (shared by {len(self.plan.users(key))} chains)" if len(self.plan.users(key)) > 1 else ""
        return f"{chain.protocol.label} {chain.method} seed {chain.seed} step {job.step}{shared}"

    def update(self, driver: Driver) -> None:
        """Called by the driver at every turn."""
        if not self.shown:
            return
        outcome = driver.outcome
        for word, keys in (("done", outcome.done), ("FAILED", outcome.failed), ("blocked", outcome.blocked), ("", driver.running)):
            for key in keys:
                self._event(driver, key, word or self._going_on(driver, key))
        if self._live is not None:
            self._live.update(self._table(driver), refresh=True)

    @staticmethod
    def _going_on(driver: Driver, key: str) -> str:
        if key in driver.adopted:
            return "adopted"
        return "queued" if driver.executor.waits(key) else "started"

    def _event(self, driver: Driver, key: str, word: str) -> None:
        """Say what became of a job, once."""
        if self._said.get(key) == word:
            return
        self._said[key] = word
        more = self._result(key) if word == "done" else f"[{key}]" if key in driver.running else ""
        self.say(f"{word:7s} {self.name(key)}  {more}".rstrip())

    def _result(self, key: str) -> str:
        scores = (read_json(self.store.artifact(key) / "metrics.json") or {}).get("scores", {}).get("default", {})
        parts = ("all",) if self.plan.jobs[key].step == 0 else ("old", "new", "all")  # there is nothing old before the second step
        return "mIoU " + ", ".join(f"{name} {100 * scores[name]:.1f}" for name in parts if scores.get(name) is not None)

    def _table(self, driver: Driver) -> Any:
        """What runs, one line each, and how far the whole is; where there is little room, names are shortened."""
        from rich.text import Text

        running = [key for key in driver.running if not driver.executor.waits(key)]
        states = {key: self.store.state(key) for key in running}
        rows = [(self.name(key), "finishing" if now.state == "done" else progress_text(now.progress)) for key, now in states.items()]
        outcome = driver.outcome
        counts = {"queued": len(driver.running) - len(running), "waiting": len(driver.waiting), "failed": len(outcome.failed)}
        words = [f"{len(outcome.done) + len(outcome.already)} of {len(self.plan.jobs)} jobs done", *(f"{n} {w}" for w, n in counts.items() if n)]
        rows.append((", ".join(words), f"{duration(time.time() - self._started)} so far"))
        room = max(20, self._live.console.width - 2 - max(len(right) for _, right in rows))
        rows = [(_shortened(left, room), right) for left, right in rows]
        width = max(len(left) for left, _ in rows)
        return Text("\n".join(f"{left:{width}}  {right}" for left, right in rows), no_wrap=True, overflow="crop")

    def finish(self, driver: Driver) -> None:
        """Last words: what was done before, what failed and where to look, what goes on."""
        outcome = driver.outcome
        if outcome.already and len(outcome.already) == len(self.plan.jobs):
            self.say(f"nothing to do: all {len(outcome.already)} jobs are done already (train them again with --force)")
        elif outcome.already:
            self.say(f"{len(outcome.already)} of {len(self.plan.jobs)} jobs were done already")
        for key in outcome.failed:
            failure = self.store.state(key).failure
            self.say(f"FAILED  {self.name(key)}: {failure.get('error', '')}")
            if failure.get("log"):
                self.say(f"        log: {failure['log']}")
        if outcome.blocked:
            self.say(f"{len(outcome.blocked)} jobs were not run because a step before them failed")
        if outcome.failed:
            self.say("run the same command again to retry from the last finished epoch, or with --keep-failed to leave them")
        if outcome.stopped:
            left = f"; {len(outcome.left)} jobs that another run submitted go on" if outcome.left else ""
            self.say(f"stopped{left}; run the same command again to resume")
        elif driver.running:
            left = f"; {len(driver.waiting)} more wait for room in the queue: run the same command again" if driver.waiting else ""
            self.say(f"{len(driver.running)} jobs are in the queue{left}; watch them with: bench status --watch")


def _shortened(name: str, room: int) -> str:
    """A name that fits: without the settings in brackets, which all methods of a run tend to share, then cut."""
    if len(name) > room:
        name = re.sub(r"\[.*?\]", "[…]", name)
    return name if len(name) <= room else f"{name[: room - 1]}…"
