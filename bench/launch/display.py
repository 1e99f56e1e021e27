"""What a terminal shows of a run: `bench status`, and the live display of `bench run`."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tabulate import tabulate

from bench.launch.status import JobStatus, counted, is_driven, status_data
from bench.plan.plan import Plan
from bench.store.changes import change_lines, changes, listed
from bench.store.records import Progress
from bench.store.results import STATES, Store

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

    from bench.launch.driver import Driver

WATCH_SECONDS = 1.0
LONGEST = 160
"""Characters of what is said of a job in a line of `bench status`."""
LEAST_ROOM = 20
"""Characters of a name in a narrow terminal."""


def progress_text(progress: Progress | None) -> str:
    """ "epoch 3/10, 120/400, loss 0.53, 2 min left"."""
    if progress is None:
        return "starting"
    parts = [progress.phase]
    if progress.epoch:
        parts.append(f"epoch {progress.epoch}/{progress.epochs}")
    if progress.iterations:
        parts.append(f"{progress.iteration}/{progress.iterations}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.eta is not None:
        parts.append(f"{duration(progress.eta)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "3 min", "2 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


# ---- bench status ------------------------------------------------------------------------------------------


def status_text(rows: Sequence[JobStatus], driven: bool = True) -> str:
    """The rows as a table; `driven`: the run they belong to still has a driver."""
    if not rows:
        return "no run in this results folder"
    table = []
    for row in rows:
        more = f" (+{len(row.places) - 1})" if len(row.places) > 1 else ""
        said = " ".join(", ".join(_words(row)).split())
        table.append([row.places[0] + more, row.key, row.state, said[:LONGEST]])
    lines = [tabulate(table, headers=["result", "job", "state", ""], tablefmt="plain", disable_numparse=True)]
    lines.append(", ".join(f"{n} {state}" for state, n in counted(rows, STATES).items()))
    lines += change_lines(row.change for row in rows)
    if not driven and any(row.state in ("failed", "interrupted", "waiting") for row in rows):
        lines.append("no bench run is at it now: run the same command again to go on")
    return "\n".join(lines)


def _words(row: JobStatus) -> list[str]:
    """What is said of a job."""
    words = [f"with {row.leader}"] if row.leader else []
    if row.slurm:
        state = (row.slurm_state or "").lower()
        words.append(f"SLURM job {row.slurm} {state} {row.slurm_reason or ''}".strip())
    if row.state == "failed" and row.failure:
        words.append(row.failure.error)
    elif row.state == "running" or row.progress:
        words.append(progress_text(row.progress))
    if row.change.files:
        words.append(f"{listed(row.change.files)} changed since")
    return words


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
            if not driven and not any(row.state in ("running", "submitted") for row in rows):
                return
            time.sleep(WATCH_SECONDS)


# ---- the display of bench run ------------------------------------------------------------------------------


class Display:
    """Shows a run: live in a terminal, one line an event elsewhere, nothing if not asked for."""

    def __init__(self, plan: Plan, store: Store, live: bool) -> None:
        self.plan, self.store, self.shown = plan, store, live
        self._said: dict[str, str] = {}
        self._live: Live | None = None
        self._started = time.time()

    def __enter__(self) -> Self:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        users = self.plan.users(key)
        if not users:  # an evaluation
            evaluation = job.inputs.evaluation
            what = f", test on {evaluation.split}" if evaluation else ""
            return f"{self.name(job.parent)}{what}" if job.parent else key
        shared = f" (shared by {len(users)} chains)" if len(users) > 1 else ""
        first = users[0]
        return f"{first.protocol.label} {first.method} seed {first.seed} step {job.step}{shared}"

    def update(self, driver: Driver) -> None:
        """Called by the driver at every turn."""
        if not self.shown:
            return
        outcome = driver.outcome
        for word, keys in (("done", outcome.done), ("FAILED", outcome.failed), ("blocked", outcome.blocked)):
            for key in keys:
                self._event(driver, key, word)
        for key in driver.running:
            self._event(driver, key, self._going_on(driver, key))
        if self._live is not None:
            self._live.update(self._table(driver, self._live.console.width), refresh=True)

    @staticmethod
    def _going_on(driver: Driver, key: str) -> str:
        if key in driver.adopted:
            return "adopted"
        return "queued" if driver.executor.waits(driver.leader.get(key, key)) else "started"

    def _event(self, driver: Driver, key: str, word: str) -> None:
        """Say what became of a job, once."""
        if self._said.get(key) == word:
            return
        self._said[key] = word
        more = self._result(key) if word == "done" else f"[{key}]" if key in driver.running else ""
        if key in driver.running and key in driver.leader:
            more += f" with [{driver.leader[key]}]"
        self.say(f"{word:7s} {self.name(key)}  {more}".rstrip())

    def _result(self, key: str) -> str:
        metrics = self.store.metrics(key)
        score = metrics.scores.get("default") if metrics else None
        if score is None:
            return ""
        means = [("old", score.old), ("new", score.new), ("all", score.all)]
        if self.plan.jobs[key].step == 0:  # there is nothing old before the second step
            means = means[-1:]
        return "mIoU " + ", ".join(f"{name} {100 * value:.1f}" for name, value in means if value is not None)

    def _table(self, driver: Driver, width: int) -> Text:
        """What runs, one line each, and how far the whole is; names are shortened where room is little."""
        from rich.text import Text

        waits = {key: driver.executor.waits(driver.leader.get(key, key)) for key in driver.running}
        running = [key for key in driver.running if not waits[key]]
        rows = []
        for key in running:
            if driver.leader.get(key) in driver.running:
                continue  # it shows with its leader
            riders = sum(driver.leader.get(other) == key for other in running)
            state = self.store.state(driver.leader.get(key, key))
            text = "finishing" if state.state == "done" else progress_text(state.progress)
            rows.append((self.name(key) + (f", and {riders} with it" if riders else ""), text))
        outcome = driver.outcome
        counts = {
            "queued": len(driver.running) - len(running),
            "waiting": len(driver.waiting),
            "failed": len(outcome.failed),
        }
        done = len(outcome.done) + len(outcome.already)
        words = [f"{done} of {len(self.plan.jobs)} jobs done"]
        words += [f"{n} {word}" for word, n in counts.items() if n]
        rows.append((", ".join(words), f"{duration(time.time() - self._started)} so far"))
        room = max(LEAST_ROOM, width - 2 - max(len(right) for _, right in rows))
        rows = [(_shortened(left, room), right) for left, right in rows]
        widest = max(len(left) for left, _ in rows)
        lines = [f"{left:{widest}}  {right}" for left, right in rows]
        return Text("\n".join(lines), no_wrap=True, overflow="crop")

    def finish(self, driver: Driver) -> None:
        """Last words: what was done before, what failed and where to look, what goes on."""
        outcome = driver.outcome
        if outcome.already and len(outcome.already) == len(self.plan.jobs):
            again = "train them again with --force"
            self.say(f"nothing to do: all {len(outcome.already)} jobs are done already ({again})")
        elif outcome.already:
            self.say(f"{len(outcome.already)} of {len(self.plan.jobs)} jobs were done already")
        if self.shown:
            for line in change_lines(changes(self.store, outcome.already).values()):
                self.say(line)
        for key in outcome.failed:
            self._say_failure(driver, key)
        if outcome.blocked:
            self.say(f"{len(outcome.blocked)} jobs were not run because a step before them failed")
        if outcome.failed:
            how = "retry from the last checkpoint, or with --keep-failed to leave them"
            self.say(f"run the same command again to {how}")
        if outcome.stopped:
            left = f"; {len(outcome.left)} jobs that another run submitted go on" if outcome.left else ""
            self.say(f"stopped{left}; run the same command again to resume")
        elif driver.running:
            more = f"; {len(driver.waiting)} more wait for room in the queue: run the same command again"
            left = more if driver.waiting else ""
            queued = f"{len(driver.running)} jobs are in the queue{left}"
            smoke = " --smoke" if self.plan.smoke else ""
            self.say(f"{queued}; watch them with: bench status{smoke} --watch")

    def _say_failure(self, driver: Driver, key: str) -> None:
        leader = driver.leader.get(key, key)
        failure = self.store.state(leader).failure
        if leader != key:
            self.say(f"FAILED  {self.name(key)}: was trained with {leader}, which failed")
            return
        self.say(f"FAILED  {self.name(key)}: {failure.error if failure else ''}")
        if failure and failure.log:
            self.say(f"        log: {failure.log}")


def _shortened(name: str, room: int) -> str:
    """A name that fits: without the settings in brackets, which methods of a run tend to share, then cut."""
    if len(name) > room:
        name = re.sub(r"\[.*?\]", "[…]", name)
    return name if len(name) <= room else f"{name[: room - 1]}…"
