"""The launcher: from a plan to running jobs, in this process, on this machine or on a SLURM cluster.

The driver holds no state of its own: what is done, running or failed stands in the results folder, so it can
be stopped and started again at any time, and another one goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from bench.errors import UserError
from bench.launch.executor import Executor
from bench.launch.links import link
from bench.launch.siblings import shared_training, source_of, standing, under_way
from bench.plan.plan import Job, Plan
from bench.store.cut import cut
from bench.store.records import RunChain, RunRecord
from bench.store.results import Store


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


class Driver:
    """Runs a plan. A job waits, runs (or is queued), is done or failed; what needs a failed one is blocked.

    Attributes:
        plan, store, executor: what, where, how.
        force: redo what is done.
        keep_failed: leave failed jobs, and what needs them, as they are.
        watch: called with the driver at every turn, for the display.
        waiting: jobs not started, in the order in which they start.
        running: jobs handed to the executor, parents first.
        leader: for those that ride along with a sibling, or did: the sibling whose training they share.
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
        self.leader: dict[str, str] = {}
        self.adopted: set[str] = set()
        self.outcome = Outcome()
        self._to_cut: dict[
            str, str
        ] = {}  # riders that their leader does not know of, and out of which sibling
        self._stopping = False
        self._interruptible = False

    def run(self) -> Outcome:
        """Run until every job is done, failed or blocked. Ctrl-C stops what was started, resumable."""
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
                # Nobody would stop what runs on this machine; a cluster's queue is there to go on.
                if not self.executor.queues:
                    self.executor.cancel(self._processes())
                if not self._stopping:  # else the signal may have broken off something that was asked
                    raise
            if self.waiting or self.running:
                self.outcome.stopped = True
                self.outcome.left = self.executor.cancel(self._processes())
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

    # ---- the turns of a run --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _begun(self) -> Iterator[None]:
        """Note what is asked for, sort the jobs into done, failed, blocked and waiting, and drive."""
        self._check_batches()
        self.store.make()
        self.executor.run = self.store.record_run(recorded(self.plan))
        with self.store.driving(self.executor.run):
            link(self.plan, self.store)
            led = under_way(self.store)
            for key, job in _longest_first(self.plan).items():
                state = standing(self.store, key, led).state
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
        led: dict[str, str] | None = None
        for key, job in list(self.waiting.items()):
            if len(self._processes()) >= self.executor.slots or self._stopping:
                return
            if key not in self.waiting or job.parent in self.waiting:
                continue
            needs = self.leader.get(job.parent, job.parent) if job.parent in self.running else None
            if needs and (job.parent in self._to_cut or not self.executor.takes_after(needs)):
                continue
            led = under_way(self.store) if led is None else led
            for sibling in self.plan.siblings(key):
                if sibling in self.waiting:
                    self._look_at(sibling, led)
            if key in self.waiting:
                self._start(*shared_training(self.plan, key, list(self.waiting)), needs)

    def _look_at(self, key: str, led: dict[str, str]) -> None:
        """A waiting job may have been done meanwhile, or be under way, or need no training."""
        if not self.force:
            if self.store.state(key).state == "done":
                del self.waiting[key]
                self.outcome.already.append(key)
                return
            source = source_of(self.plan, key, self.store.done)
            if source is not None:
                del self.waiting[key]
                self._cut(source, key)
                self.outcome.done.append(key)
                return
        for source in filter(None, (key, led.get(key))):
            if source in self.running or self.executor.adopt(source, self.store.state(source)):
                self._ride(key, source)
                return
        source = next((other for other in self.running if self.plan.yields(other, key)), None)
        if source is not None:
            self._to_cut[key] = source
            self._ride(key, self.leader.get(source, source))

    def _ride(self, key: str, leader: str) -> None:
        """A waiting job is under way: in a process that another driver started, or along with a sibling."""
        if leader in self.adopted or leader not in self.running:
            self.adopted.add(key)
        self.running[key] = self.waiting.pop(key)
        if leader != key:
            self.leader[key] = leader

    def _start(self, leader: str, riders: list[str], needs: str | None) -> None:
        """Hand a job to the executor, and with it those that its training serves too."""
        for key in (leader, *riders):
            self.running[key] = self.waiting.pop(key)
        for key in riders:
            self.leader[key] = leader
            self.store.clear_work(key)  # its own earlier attempt, if there was one, is not gone on with
        self.store.open_work(self.plan.record(leader, also=riders), fresh=self.force)
        if self.executor.in_process:
            self.watch(self)
        with self._interrupts(self.executor.in_process):
            self.executor.submit(self.running[leader], needs)

    def _processes(self) -> list[str]:
        """Keys of the jobs that have a process: riders have none of their own."""
        return list(dict.fromkeys(self.leader.get(key, key) for key in self.running))

    def collect(self) -> bool:
        """Judge the jobs that ended, parents first; True if there were any."""
        self.executor.look()
        before = len(self.running)
        ended: dict[str, str | None] = {}
        for key, job in list(self.running.items()):
            if key not in self.running or job.parent in self.running:
                continue
            leader = self.leader.get(key, key)
            if leader not in ended:  # asked before the state: what a job leaves, it leaves before it ends
                ended[leader] = self.executor.ended(leader)
            how = ended[leader]
            if how is None:
                continue
            del self.running[key]
            self._judge(key, job, leader, how)
        return len(self.running) < before

    def _judge(self, key: str, job: Job, leader: str, how: str) -> None:
        """A job whose process ended is done or failed; one that rides along is what its leader is."""
        state = self.store.state(leader).state
        if state == "done":
            source = self._to_cut.pop(key, None)
            if source is not None and self.store.done(source):
                self._cut(source, key)
            if self.store.done(key):
                self.outcome.done.append(key)
            else:  # its leader was asked for less than was thought
                self.leader.pop(key, None)
                self.waiting[key] = job
            return
        if state != "failed":
            log = self.executor.log(leader)
            self.store.report_failure(leader, f"{how}; last words: {last_words(log)}", log)
        self.outcome.failed.append(key)
        self._block([key])

    def _cut(self, source: str, key: str) -> None:
        cut(self.store, source, self.plan.record(key))

    def _block(self, failed: Iterable[str]) -> None:
        """What needs a failed job does not run, and leaves the queue if it is there."""
        lost = self.plan.descendants(set(failed))
        below = [key for key in self.plan.jobs if key in lost]
        queued = [key for key in below if key in self.running]
        self.executor.cancel(list(dict.fromkeys(self.leader.get(key, key) for key in queued)))
        for key in queued:
            del self.running[key]
            self.store.withdraw(key)
        self.outcome.blocked += [*queued, *(key for key in below if self.waiting.pop(key, None))]

    def _check_batches(self) -> None:
        """The batch size is global: a number of processes must divide it, or nothing is submitted."""
        for job in self.plan.jobs.values():
            batch_size = job.config.at(job.step).batch_size
            if batch_size % self.executor.processes:
                what = f"batch_size = {batch_size} of {job.method}, step {job.step}, does not divide"
                by = f"by the profile's gpus = {self.executor.processes}"
                raise UserError(f"{what} {by}; change one of them (--set batch_size=…)")

    # ---- interruptions -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, kill and a closing terminal ask the driver to stop.

        They break off a pause at once, but never a submission halfway.
        """

        def stop(number: int, frame: FrameType | None) -> None:
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


def recorded(plan: Plan) -> RunRecord:
    """What a run is asked for: its chains, and the evaluations of their steps."""
    chains = [
        RunChain(keys=list(chain.keys), places=[chain.place(t) for t in range(len(chain.keys))])
        for chain in plan.chains
    ]
    for key, job in plan.jobs.items():
        evaluation = job.inputs.evaluation if job.part.content.get("kind") == "evaluate" else None
        if evaluation and job.parent:
            at = f" at {evaluation.crop}" if evaluation.crop else ""
            places = [
                f"{chain.place(job.step)} tested on {evaluation.split}{at}"
                for chain in plan.users(job.parent)
            ]
            chains += [RunChain(keys=[key], places=[place]) for place in places]
    return RunRecord(chains=chains)


def most_threads(plan: Plan) -> int:
    """CPU threads of the job that has most of them."""
    return max((job.config.threads for job in plan.jobs.values()), default=1)


def _longest_first(plan: Plan) -> dict[str, Job]:
    """The jobs by the iterations of the longest path that begins with each.

    What takes longest starts first, parents before children.
    """
    path: dict[str, int] = {}
    for key, job in reversed(list(plan.jobs.items())):
        path[key] = job.iterations + path.get(key, 0)
        if job.parent is not None:
            path[job.parent] = max(path.get(job.parent, 0), path[key])
    return dict(sorted(plan.jobs.items(), key=lambda item: path[item[0]], reverse=True))


def last_words(log: str, lines: int = 3) -> str:
    """The last lines of a job's output, on one line."""
    try:
        text = Path(log).read_text(encoding="utf-8", errors="replace") if log else ""
    except OSError:
        text = ""
    return " | ".join(line.strip() for line in text.splitlines()[-lines:]) or "none"
