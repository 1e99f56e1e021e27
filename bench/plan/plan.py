"""The plan: which jobs a run consists of, which of them are shared, and how much work each is.

A job is one step of one chain (protocol, method, seed). Its key is a digest of everything that decides its
outcome, its parent's key among it. Jobs with the same key are one job: they are trained once and shared. Jobs
that differ only in what is recorded while they train are *siblings*: one training serves them all.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.method.resolve import Resolved
from bench.method.settings import Settings
from bench.plan.keys import content_digest, key_of
from bench.protocol.protocol import Protocol
from bench.store.records import EvaluationInputs, Inputs, JobRecord

SMOKE_ITERATIONS = 2


@dataclass(frozen=True)
class Part:
    """What a job is, whatever its seed.

    Attributes:
        content: its inputs without seed and parent, as JSON values.
        digest: of them; `plain` is that without what is recorded.
        protocol: the protocol (its joint form where the method learns all at once).
        step: index of the step.
        method: the method that trains it; for a shared step 0 the one that owns it.
        config: all values of that method's Config.
        images, iterations: size of the work.
        recorders: "module:class" of each recorder.
    """

    content: Mapping[str, object] = field(repr=False)
    digest: str
    plain: str
    protocol: Protocol = field(repr=False)
    step: int
    method: str
    config: Settings = field(repr=False)
    images: int
    iterations: int
    recorders: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Job:
    """One step to be trained, or one evaluation.

    Attributes:
        key: of its inputs.
        part: what it is, whatever its seed.
        seed: of its chain.
        parent: key of the job before it.
    """

    key: str
    part: Part
    seed: int
    parent: str | None

    @property
    def protocol(self) -> Protocol:
        return self.part.protocol

    @property
    def step(self) -> int:
        return self.part.step

    @property
    def method(self) -> str:
        return self.part.method

    @property
    def config(self) -> Settings:
        return self.part.config

    @property
    def images(self) -> int:
        return self.part.images

    @property
    def iterations(self) -> int:
        return self.part.iterations

    @functools.cached_property
    def inputs(self) -> Inputs:
        """Everything that decides the outcome."""
        return Inputs.model_validate({**self.part.content, "seed": self.seed, "parent": self.parent})

    @property
    def training(self) -> tuple[str, int, str | None]:
        """What siblings share: everything but what is recorded."""
        return self.part.plain, self.seed, self.parent

    def record(
        self, data_root: str | None, places: Sequence[str] = (), also: Sequence[JobRecord] = ()
    ) -> JobRecord:
        """What the job's process must know: job.json.

        Args:
            data_root: where the data was found.
            places: where results link to it.
            also: siblings that the same training yields.
        """
        return JobRecord(
            key=self.key,
            inputs=self.inputs,
            step=self.step,
            method=self.method,
            settings=self.config.model_dump(mode="json"),
            protocol=self.protocol,
            images=self.images,
            data_root=data_root,
            places=list(places),
            recorders=dict(self.part.recorders),
            also=list(also),
        )


@dataclass(frozen=True)
class Chain:
    """One method on one protocol with one seed: the keys of its steps, and how results name it."""

    protocol: Protocol
    track: str
    method: str
    title: str
    seed: int
    keys: tuple[str, ...]
    footnotes: tuple[str, ...]
    recipe: Resolved = field(repr=False, compare=False)

    def place(self, index: int, folder: str | None = None) -> str:
        """Where results link to the job of a step."""
        return f"{folder or self.protocol.label}/{self.track}/{self.method}/seed-{self.seed}/step-{index}"


@dataclass(frozen=True)
class Plan:
    """Jobs in an order in which each comes after its parent, and the chains that use them."""

    jobs: Mapping[str, Job]
    chains: Sequence[Chain]
    data_root: str | None
    smoke: bool
    warnings: Sequence[str] = ()

    def users(self, key: str) -> list[Chain]:
        """The chains that contain a job."""
        return self._users.get(key, [])

    @functools.cached_property
    def _users(self) -> dict[str, list[Chain]]:
        found: dict[str, list[Chain]] = {}
        for chain in self.chains:
            for key in chain.keys:
                found.setdefault(key, []).append(chain)
        return found

    def siblings(self, key: str) -> list[str]:
        """Jobs that one training could serve together with this one, itself among them, in the plan's
        order."""
        return self._siblings[self.jobs[key].training]

    @functools.cached_property
    def _siblings(self) -> dict[tuple[str, int, str | None], list[str]]:
        found: dict[tuple[str, int, str | None], list[str]] = {}
        for key, job in self.jobs.items():
            found.setdefault(job.training, []).append(key)
        return found

    def served_together(self, key: str, wanted: Sequence[str]) -> list[str]:
        """Those of some jobs that the training of `key` can serve too: siblings whose records do not
        contradict each other."""
        together, records = [], dict(self.jobs[key].inputs.records)
        for other in self.siblings(key):
            theirs = self.jobs[other].inputs.records
            if (
                other != key
                and other in wanted
                and all(records.get(name, own) == own for name, own in theirs.items())
            ):
                together.append(other)
                records.update(theirs)
        return together

    def yields(self, key: str, other: str) -> bool:
        """Whether the artifact of a job holds all that a sibling's would."""
        own, theirs = self.jobs[key].inputs.records, self.jobs[other].inputs.records
        return other in self.siblings(key) and all(
            own.get(name) == settings for name, settings in theirs.items()
        )

    def descendants(self, keys: set[str]) -> set[str]:
        """All jobs that need one of `keys`, directly or not."""
        below: set[str] = set()
        for key, job in self.jobs.items():
            if job.parent in keys or job.parent in below:
                below.add(key)
        return below

    def record(self, key: str, also: Sequence[str] = ()) -> JobRecord:
        """job.json of a job; `also` are siblings that the same training yields."""
        job = self.jobs[key]
        places = [chain.place(job.step) for chain in self.users(key)][:1]
        root = str(Path(self.data_root).resolve()) if self.data_root else None
        return job.record(root, places, [self.record(other) for other in also])

    def evaluated(self, evaluation: EvaluationInputs, last_only: bool = True) -> Plan:
        """This plan and an evaluation of its chains' steps (the last of each, or all): jobs like the
        others."""
        jobs = dict(self.jobs)
        for chain in self.chains:
            for key in chain.keys[-1:] if last_only else chain.keys:
                job = evaluation_job(self.jobs[key], evaluation)
                jobs[job.key] = job
        return replace(self, jobs=jobs)


def evaluation_of(record: JobRecord, evaluation: EvaluationInputs | None = None) -> JobRecord:
    """A job that tests a finished one anew; its key follows from that job's and from what is looked at."""
    changes = {
        "kind": "evaluate",
        "training": {},
        "images": "",
        "records": {},
        "later": [],
        "evaluation": evaluation or EvaluationInputs(),
        "parent": record.key,
    }
    inputs = record.inputs.model_copy(update=changes)
    about = {"key": key_of(inputs), "inputs": inputs, "recorders": {}, "also": [], "places": []}
    return record.model_copy(update=about)


def evaluation_job(of: Job, evaluation: EvaluationInputs) -> Job:
    """The same as a job of a plan."""
    record = evaluation_of(of.record(None), evaluation)
    content = record.inputs.model_dump(mode="json", exclude={"seed", "parent"})
    digest = content_digest(content)
    part = replace(of.part, content=content, digest=digest, plain=digest, iterations=0, recorders={})
    return Job(record.key, part, of.seed, of.key)
