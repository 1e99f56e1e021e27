"""A results folder whose jobs are finished by hand, with known counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.data.dataset import load_dataset
from bench.data.index import ClassIndex
from bench.launch.links import link
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.protocol.protocol import Protocol
from bench.report import tables
from bench.report.collect import Section, collect
from bench.report.numbers import numbers
from bench.score.conventions import CONVENTIONS, Convention
from bench.score.counts import Counts, write_counts
from bench.score.iou import old_new_all, score
from bench.store.records import (
    Environment,
    JobRecord,
    Metrics,
    RunChain,
    RunRecord,
    Score,
    write_record,
)
from bench.store.results import Store

DATASET = load_dataset("shapes")
TINY = Protocol("tiny", DATASET, "overlapped", ((1,), (2,)), "tiny: one class, then another")
Pixels = Mapping[tuple[int, int], int]
"""Pixels of each (true, predicted) class."""

# One step, classes 0 and 1, while class 2 is to come: future pixels are background, and ignored by MiB.
FIRST: Pixels = {(0, 0): 60, (1, 1): 40, (2, 1): 20}
"""default: IoU 60/80 and 40/60, all 70.8; mib: class 1 alone, 100."""
LAST: Pixels = {(0, 0): 60, (1, 1): 30, (1, 2): 10, (2, 2): 20}
"""IoU 1, 3/4, 2/3: old 87.5, new 66.7, all 80.6; mib: old 75.0, new 66.7, all 70.8."""
WORSE: Pixels = {(0, 0): 60, (1, 0): 40, (2, 2): 10, (2, 0): 10}
"""IoU 60/110, 0, 1/2: old 27.3, new 50.0, all 34.8."""
PERFECT: Pixels = {(0, 0): 60, (1, 1): 40, (2, 2): 20}
GOOD, BAD = {0: FIRST, 1: LAST}, {0: FIRST, 1: WORSE}
"""What a chain shows after each step."""
RAN = Environment(finished="2026-01-01T00:00:00+0000", commit="abc1234", machine="x86_64")
"""On what the jobs ran, unless a test says otherwise."""


@dataclass(frozen=True)
class World:
    """A results folder whose jobs are finished by hand."""

    store: Store

    def finish(
        self,
        methods: str | Sequence[str],
        pixels: Mapping[int, Pixels],
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        overrides: Sequence[str] = (),
        protocol: Protocol | None = None,
        memory: int = 0,
        fingerprint: str = "f" * 16,
        track: str = "small",
        smoke: bool = False,
        ran: Environment = RAN,
    ) -> Plan:
        """Plan a run as `bench run` does, write the artifacts of its first `steps` steps, and link them."""
        protocol = protocol or TINY
        index = ClassIndex(tuple(f"i{i}" for i in range(60)), (0b11111111110,) * 60, fingerprint)
        names = [methods] if isinstance(methods, str) else list(methods)
        indexes = {protocol.dataset.name: {"train": index, "test": index}}
        plan = make_plan([protocol], names, track, seeds, overrides, smoke=smoke, indexes=indexes)
        self.store.make()
        chains = [
            RunChain(keys=list(c.keys), places=[c.place(t) for t in range(len(c.keys))]) for c in plan.chains
        ]
        name = f"{len(self.store.runs()):03d}.json"  # by order: several may be made in a second
        write_record(self.store.root / "runs" / name, RunRecord(chains=chains))
        for chain in plan.chains:
            for t, key in enumerate(chain.keys[:steps]):
                shown = pixels[t if len(chain.keys) > 1 else len(protocol.groups) - 1]
                self.publish(plan.record(key), shown, memory if t else 0, ran)
        link(plan, self.store)
        return plan

    def publish(self, record: JobRecord, pixels: Pixels, memory: int = 0, ran: Environment = RAN) -> None:
        """The artifact of a job: two test images that share the pixels."""
        dataset, step = record.protocol.dataset, record.protocol.step(record.step)
        rows = (*step.seen, *(c for c in range(1, len(dataset.classes)) if c not in step.seen))
        cells = [(i, rows.index(true), rows.index(predicted)) for i in range(2) for true, predicted in pixels]
        amounts = np.array([n // 2 for _ in range(2) for n in pixels.values()])
        seen = np.array([True, True])
        counts = Counts(("a", "b"), seen, rows, step.n_classes, np.array(cells, np.int32), amounts)

        def scored(how: Convention) -> Score:
            iou = score(counts, how, dataset, step)
            means = old_new_all(iou, record.protocol.step(0).n_classes, how)
            return Score(**{name: known(v) for name, v in means.items()}, iou=[known(v) for v in iou])

        def known(value: float) -> float | None:
            return None if np.isnan(value) else float(value)

        metrics = Metrics(
            key=record.key,
            classes=[dataset.classes[c] for c in step.seen],
            images=2,
            scores={name: scored(CONVENTIONS.find(name)) for name in CONVENTIONS.known()},
            memory=[f"i{i}" for i in range(memory)],
        )

        def write(folder: Path) -> None:
            write_counts(folder / "confusion.npz", counts)
            for content in (record, ran, metrics):
                write_record(folder / content.file, content)

        self.store.publish(record.key, write)

    def section(self) -> Section:
        (section,) = collect(self.store)
        return section

    def table(self, how: str = "default") -> tables.Table:
        """The table of the only protocol."""
        section = self.section()
        return tables.summary(section, numbers([section]), how)


def row(table: tables.Table, title: str) -> dict[str, str]:
    """A row by column: "old", "new", "all", "avg", "n"."""
    (found,) = [r for r in table.rows if r.title == title]
    return {
        column.partition(" ")[0]: cell.text
        for column, cell in zip(table.columns[1:], found.cells, strict=True)
    }
