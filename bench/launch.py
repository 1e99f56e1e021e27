"""The launcher: from a plan to running jobs, in this process, on this machine or on a SLURM cluster.

The driver holds no state of its own: what is done, running or failed stands in the results folder, so it can be stopped and
started again at any time, and another one goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import shipped
from bench.errors import UserError, unknown
from bench.plan import Chain, Job, Plan, content_key
from bench.store import Store, read_json, write_json

if TYPE_CHECKING:
    from bench.executors import Executor

CLUSTERS = ("inline", "local", "slurm")


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        done, failed, blocked: keys; blocked jobs need a failed one.
        already: keys that were done before.
        stopped: the run was interrupted.
        left: keys that another run submitted and that go on.
    """

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    stopped: bool = False
    left: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.failed or self.blocked or self.stopped)


def make_executor(cluster: str, store: Store, jobs: int | None = None, profile: str | None = None) -> Executor:
    """The executor for --cluster.

    Args:
        cluster: "inline", "local" or "slurm".
        store: the results folder.
        jobs: at once, for "local"; None: one a GPU, else up to four.
        profile: for "slurm": a name of slurm/ or a TOML file; None: the default.

    Raises:
        UserError: an unknown cluster or profile, an option of another cluster, or no SLURM here.
    """
    if cluster not in CLUSTERS:
        raise unknown("cluster", cluster, CLUSTERS, where="--cluster")
    for option, value, owner in (("--jobs", jobs, "local"), ("--profile", profile, "slurm")):
        if value is not None and cluster != owner:
            raise UserError(f"{option} {value}: an option of --cluster {owner}, not of --cluster {cluster}")
    from bench import executors

    if cluster == "inline":
        return executors.Inline(store)
    if cluster == "local":
        gpus = executors.visible_gpus()
        return executors.Local(store, jobs or executors.default_slots(gpus), gpus)
    from bench.cluster import load_profile

    return executors.Slurm(store, load_profile(profile))


class Driver:
    """Runs a plan. A job waits, then runs (or is queued), then is done or failed; jobs below a failed one are blocked.

    Attributes:
        plan, store, executor: what, where, how.
        force: redo what is done.
        keep_failed: leave failed jobs, and what needs them, as they are.
        watch: called with the driver at every turn, for the display.
        waiting: jobs not started, in the order in which they start.
        running: jobs handed to the executor, parents first.
        adopted: those of them that another driver started.
        outcome: the others.
    """

    def __init__(
        self, plan: Plan, store: Store, executor: Executor, force: bool = False, keep_failed: bool = False,
        watch: Callable[[Driver], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.plan, self.store, self.executor, self.watch = plan, store, executor, watch
        self.force, self.keep_failed = force, keep_failed
        self.waiting: dict[str, Job] = {}
        self.running: dict[str, Job] = {}
        self.adopted: set[str] = set()
        self.outcome = Outcome()
        self._stopping = False
        self._interruptible = False

    def run(self) -> Outcome:
        """Run until every job is done, failed or blocked. Ctrl-C stops what was started; everything stays resumable."""
        with self._begun(), self._signals():
            try:
                while (self.waiting or self.running) and not self._stopping:
                    self.start()
                    self.watch(self)
                    if not self.collect():
                        self._pause()
            except KeyboardInterrupt:
                pass
            except BaseException:
                if not self.executor.queues:  # nobody would stop what runs on this machine; a cluster's queue is there to go on
                    self.executor.cancel(self.running)
                if not self._stopping:  # else the signal may have broken off something that was asked
                    raise
            if self.waiting or self.running:
                self.outcome.stopped = True
                self.outcome.left = self.executor.cancel(self.running)
        self.watch(self)
        return self.outcome

    def detach(self) -> Outcome:
        """Hand everything to an executor that queues, and leave it alone."""
        if not self.executor.queues:
            raise UserError("--detach: only a queue keeps jobs without this process; use --cluster slurm")
        with self._begun():
            self.start()
        self.watch(self)
        return self.outcome

    # ---- the turns of a run --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _begun(self) -> Iterator[None]:
        """Note what is asked for, sort the jobs into done, failed, blocked and waiting, and be the driver of this run meanwhile."""
        self._check_batches()
        self.store.make()
        chains = [{"keys": c.keys, "places": [c.place(t) for t in range(len(c.keys))]} for c in self.plan.chains]
        self.executor.run = self.store.record_run({"chains": chains})
        with self.store.driving(self.executor.run):
            self.link()
            for key, job in _longest_first(self.plan).items():
                state = self.store.state(key).state
                if state == "done" and not self.force:
                    self.outcome.already.append(key)
                elif state == "failed" and self.keep_failed:
                    self.outcome.failed.append(key)
                else:
                    self.waiting[key] = job
            self._block(self.outcome.failed)
            yield

    def start(self) -> None:
        """Start every job that can start now."""
        for key, job in list(self.waiting.items()):
            if len(self.running) >= self.executor.slots or self._stopping:
                return
            needs = job.parent if job.parent in self.running else None
            if job.parent in self.waiting or (needs and not self.executor.takes_after(needs)):
                continue
            del self.waiting[key]
            state = self.store.state(key)
            if state.state == "done" and not self.force:  # by another driver, meanwhile
                self.outcome.already.append(key)
                continue
            self.running[key] = job
            if self.executor.adopt(key, state):
                self.adopted.add(key)
                continue
            self.store.open_work(key, record(job, self.plan), fresh=self.force)
            if self.executor.in_process:
                self.watch(self)
            with self._interrupts(self.executor.in_process):
                self.executor.submit(job, needs)

    def collect(self) -> bool:
        """Judge the jobs that ended, parents first; True if there were any."""
        self.executor.look()
        before = len(self.running)
        for key, job in list(self.running.items()):
            if key not in self.running or job.parent in self.running:
                continue
            how = self.executor.ended(key)  # asked before the state: what a job leaves, it leaves before it ends
            if how is None:
                continue
            del self.running[key]
            state = self.store.state(key).state
            if state == "done":
                self.outcome.done.append(key)
                continue
            if state != "failed":
                log = self.executor.log(key)
                self.store.report_failure(key, f"{how}; last words: {last_words(log)}", log)
            self.outcome.failed.append(key)
            self._block([key])
        return len(self.running) < before

    def _block(self, failed: list[str]) -> None:
        """What needs a failed job does not run, and leaves the queue if it is there."""
        lost = self.plan.descendants(set(failed))
        below = [key for key in self.plan.jobs if key in lost]
        queued = [key for key in below if key in self.running]
        self.executor.cancel(queued)
        for key in queued:
            del self.running[key]
            self.store.withdraw(key)
        self.outcome.blocked += [*queued, *(key for key in below if self.waiting.pop(key, None))]

    def _check_batches(self) -> None:
        """The batch size is global: a number of processes that does not divide it is refused before anything is submitted."""
        for job in self.plan.jobs.values():
            if job.inputs["training"]["batch_size"] % self.executor.processes:
                raise UserError(
                    f"batch_size = {job.inputs['training']['batch_size']} of {job.method}, step {job.step}, does not divide by the profile's "
                    f"gpus = {self.executor.processes}; change one of them (--set batch_size=…)"
                )

    # ---- interruptions -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, kill and a closing terminal ask the driver to stop. They break off a pause at once, but never a submission halfway."""

        def stop(number: int, frame: Any) -> None:
            self._stopping = True
            if self._interruptible:
                self._interruptible = False
                raise KeyboardInterrupt

        if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
            yield
            return
        answered = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            answered.append(signal.SIGHUP)
        before = {number: signal.signal(number, stop) for number in answered}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _interrupts(self, allowed: bool = True) -> Iterator[None]:
        """Within, a signal raises KeyboardInterrupt."""
        self._interruptible = allowed
        try:
            yield
        finally:
            self._interruptible = False

    def _pause(self) -> None:
        with self._interrupts():
            if not self._stopping:
                time.sleep(self.executor.poll_seconds)

    # ---- links ---------------------------------------------------------------------------------------------------------

    def link(self) -> None:
        """Links for people, to artifacts as they will be, and chain.json beside them: how the rows of a table are to be read."""
        for chain in self.plan.chains:
            folder = self._folder(chain)
            for t, key in enumerate(chain.keys):
                self.store.link(chain.place(t, folder), key)
            write_json((self.store.root / chain.place(0, folder)).parent.parent / "chain.json", describe(chain))

    def _folder(self, chain: Chain) -> str:
        """results/<protocol>; other data or another class order under the same name gets a folder of its own, so that no table mixes them."""
        inputs = self.plan.jobs[chain.keys[0]].inputs
        groups = [list(group) for group in chain.protocol.groups]
        same = {"fingerprint": f"{inputs['data']['train']}-{inputs['data']['test']}", "groups": groups}
        label = chain.protocol.label
        for name in (label, f"{label}~{content_key(same)[:6]}"):
            path = self.store.root / name / "data.json"
            known = read_json(path)
            if known is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {**same, "root": self.plan.data_root, "data_set": chain.protocol.dataset.title})
                return name
            if all(known.get(key) == value for key, value in same.items()):
                return name
        raise UserError(f"{self.store.root / name}: holds the results of other data or another class order; use another --results DIR")


def _longest_first(plan: Plan) -> dict[str, Job]:
    """The jobs by the iterations of the longest path that begins with each: what takes longest starts first, parents before children."""
    path: dict[str, int] = {}
    for key, job in reversed(list(plan.jobs.items())):
        path[key] = job.iterations + path.get(key, 0)
        if job.parent is not None:
            path[job.parent] = max(path.get(job.parent, 0), path[key])
    return dict(sorted(plan.jobs.items(), key=lambda item: path[item[0]], reverse=True))


def record(job: Job, plan: Plan) -> dict[str, Any]:
    """What a job's process must know: job.json."""
    source = job.protocol.dataset.source
    shipped_set = source.parent == shipped.PACKAGE / "data" / "sets"
    return {
        "key": job.key,
        "inputs": job.inputs,
        "method": job.method,
        "settings": job.settings,
        "protocol": {
            "name": job.protocol.name,
            "dataset": job.protocol.dataset.name if shipped_set else str(source.resolve()),
            "setting": job.protocol.setting,
            "groups": job.protocol.groups,
            "partition_groups": job.protocol.partition_groups,
        },
        "data_root": str(Path(plan.data_root).resolve()) if plan.data_root else None,
        "label": [f"{chain.place(job.step)}" for chain in plan.users(job.key)][:1],
    }


def describe(chain: Chain) -> Mapping[str, Any]:
    """What a report must know of a row: chain.json."""
    protocol = chain.protocol
    return {
        "protocol": protocol.label,
        "protocol_title": protocol.title,
        "data_set": protocol.dataset.name,
        "setting": protocol.setting,
        "groups": protocol.groups,
        "track": chain.track,
        "method": chain.method,
        "title": chain.title,
        "steps": len(chain.keys),
        "footnotes": chain.footnotes,
        "network": chain.recipe.config.network,
        "settings": chain.recipe.config.model_dump(),
        "sources": dict(chain.recipe.sources),
    }


def last_words(log: str, lines: int = 3) -> str:
    """The last lines of a job's output, on one line."""
    try:
        text = Path(log).read_text(encoding="utf-8", errors="replace") if log else ""
    except OSError:
        text = ""
    return " | ".join(line.strip() for line in text.splitlines()[-lines:]) or "none"
