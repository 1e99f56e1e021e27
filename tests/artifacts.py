"""A results folder whose jobs are finished by hand, with known counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import metrics
from bench.data.dataset import load_dataset
from bench.data.index import ClassIndex
from bench.launch import Driver, make_executor, record
from bench.plan import Job, Plan, make_plan
from bench.protocol import Protocol
from bench.reporting import tables
from bench.reporting.collect import Section, collect, numbers
from bench.store import Store, write_json

DATASET = load_dataset("shapes")
TINY = Protocol("tiny", DATASET, "overlapped", ((1,), (2,)), "tiny: one class, then another")
Pixels = Mapping[tuple[int, int], int]
"""Pixels of each (true, predicted) class."""

# One step, classes 0 and 1, while class 2 is still to come: future pixels are background by default and ignored by MiB.
FIRST: Pixels = {(0, 0): 60, (1, 1): 40, (2, 1): 20}
"""default: IoU 60/80 and 40/60, all 70.8; mib: class 1 alone, 100."""
LAST: Pixels = {(0, 0): 60, (1, 1): 30, (1, 2): 10, (2, 2): 20}
"""IoU 1, 3/4, 2/3: old 87.5, new 66.7, all 80.6; mib: old 75.0, new 66.7, all 70.8."""
WORSE: Pixels = {(0, 0): 60, (1, 0): 40, (2, 2): 10, (2, 0): 10}
"""IoU 60/110, 0, 1/2: old 27.3, new 50.0, all 34.8."""
PERFECT: Pixels = {(0, 0): 60, (1, 1): 40, (2, 2): 20}
GOOD, BAD = {0: FIRST, 1: LAST}, {0: FIRST, 1: WORSE}
"""What a chain shows after each step."""


@dataclass(frozen=True)
class World:
    """A results folder whose jobs are finished by hand."""

    store: Store

    def finish(
        self, methods: str | Sequence[str], pixels: Mapping[int, Pixels], seeds: Sequence[int] = (0,), steps: int | None = None,
        overrides: Sequence[str] = (), protocol: Protocol | None = None, memory: int = 0, fingerprint: str = "f" * 16, track: str = "small",
        smoke: bool = False,
    ) -> Plan:  # fmt: skip
        """Plan a run as `bench run` does, write the artifacts of its first `steps` steps, and link them."""
        protocol = protocol or TINY
        index = ClassIndex(tuple(f"i{i}" for i in range(60)), (0b11111111110,) * 60, fingerprint)
        names = [methods] if isinstance(methods, str) else list(methods)
        plan = make_plan([protocol], names, track, seeds, overrides, smoke=smoke, indexes={protocol.dataset.name: {"train": index, "test": index}})
        self.store.make()
        run = {"chains": [{"keys": c.keys, "places": [c.place(t) for t in range(len(c.keys))]} for c in plan.chains]}
        write_json(self.store.root / "runs" / f"{len(self.store.runs()):03d}.json", run)  # named by order: several may be made in a second
        for chain in plan.chains:
            for t, key in enumerate(chain.keys[:steps]):
                self.publish(plan, plan.jobs[key], pixels[t if len(chain.keys) > 1 else len(protocol.groups) - 1], memory if t else 0)
        Driver(plan, self.store, make_executor("inline", self.store)).link()
        return plan

    def publish(self, plan: Plan, job: Job, pixels: Pixels, memory: int = 0) -> None:
        """The artifact of a job: two test images that share the pixels."""
        dataset, step = job.protocol.dataset, job.protocol.step(job.step)
        rows = (*step.seen, *(c for c in range(1, len(dataset.classes)) if c not in step.seen))
        cells = [(i, rows.index(true), rows.index(predicted)) for i in range(2) for true, predicted in pixels]
        amounts = [n // 2 for _ in range(2) for n in pixels.values()]
        counts = metrics.Counts(("a", "b"), np.array([True, True]), rows, step.n_classes, np.array(cells, np.int32), np.array(amounts))
        scores = {}
        for name, how in metrics.CONVENTIONS.items():
            iou = metrics.score(counts, how, dataset, step)
            scores[name] = {"iou": [None if np.isnan(v) else float(v) for v in iou]}

        def write(folder: Path) -> None:
            metrics.write_counts(folder / "confusion.npz", counts)
            write_json(folder / "job.json", record(job, plan))
            write_json(folder / "environment.json", {"finished": "2026-01-01T00:00:00+0000", "commit": "abc1234", "gpu": None, "machine": "x86_64"})
            write_json(
                folder / "metrics.json",
                {
                    "key": job.key, "classes": [dataset.classes[c] for c in step.seen], "images": 2, "scores": scores,
                    "memory": [f"i{i}" for i in range(memory)],
                },
            )  # fmt: skip

        self.store.publish(job.key, write)

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
    return {column.partition(" ")[0]: cell.text for column, cell in zip(table.columns[1:], found.cells, strict=True)}
