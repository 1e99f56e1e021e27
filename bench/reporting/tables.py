"""Tables as values: what stands in which cell, which one is best, and what the footnotes say. How they look is render.py's concern.

Rules of a table:

* Its numbers are means over the seeds that finished every step; a chain under way is named in a footnote, with what it has so far.
* The best number of a column and the second are marked, as printed. Methods that learn all classes at once (Joint) take no part: they are
  the upper bound and stand apart. Neither do rows under other conditions (network, exemplar memory) than most rows have; a footnote
  says so.
* Identical footnotes share a number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean, stdev
from typing import Any

import pandas as pd

from bench.metrics import convention
from bench.reporting.bootstrap import COVERAGE, interval
from bench.reporting.collect import QUANTITIES, Chain, Result, Section
from bench.store import read_json

NONE = "-"
"""What a cell without a number says."""
SMOKE = "smoke run: two iterations a step, the numbers mean nothing"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: as every format prints it.
        value: the mean behind it, in percent; None for a cell that takes no part in ranking.
        n: seeds behind it.
        rank: "best", "second" or "".
        detail: where the number comes from: each seed's value and job.
        notes: footnotes of this cell alone.
    """

    text: str = NONE
    value: float | None = None
    n: int = 0
    rank: str = ""
    detail: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row: what it is about, its cells, footnotes, and whether it stands apart from the others."""

    title: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    apart: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: for links and labels.
        caption: what it shows.
        columns: headers, that of the row titles first.
        rows: those apart last.
        says: lines under it: what the columns average, and under which convention.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    says: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        """The name as links in HTML and LaTeX may carry it."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name)

    @cached_property
    def notes(self) -> list[str]:
        """Footnotes in the order of their first mark; the first has number 1."""
        texts = (note for row in self.rows for notes in (row.notes, *(cell.notes for cell in row.cells)) for note in notes)
        return list(dict.fromkeys(texts))

    def marks(self, notes: Iterable[str]) -> list[int]:
        """Numbers of some footnotes, ascending."""
        return sorted(self.notes.index(note) + 1 for note in set(notes))


def number(values: Sequence[float]) -> str:
    """Percentages of several seeds as tables print them: the mean with one decimal, ± the sample standard deviation if there are two or more."""
    if not values:
        return NONE
    return f"{mean(values):.1f}" if len(values) == 1 else f"{mean(values):.1f} ± {stdev(values):.1f}"


def span(first: int, last: int) -> str:
    """ "0-6", "7", or "none"."""
    return "none" if last < first else str(first) if first == last else f"{first}-{last}"


def ranked(cells: Sequence[Cell]) -> list[Cell]:
    """The same cells with the best and the second number marked, as printed: equal numbers have equal rank."""
    printed = sorted({round(cell.value, 1) for cell in cells if cell.value is not None}, reverse=True)
    ranks = dict(zip(printed, ("best", "second"), strict=False)) if len(printed) > 1 else {}
    return [replace(cell, rank="" if cell.value is None else ranks.get(round(cell.value, 1), "")) for cell in cells]


# ---- one protocol --------------------------------------------------------------------------------------------------------


def summary(section: Section, measured: pd.DataFrame, how: str, intervals: bool = False) -> Table:
    """Methods x old, new, all and avg of a section.

    Args:
        section: which one.
        measured: its numbers, as `collect.numbers` gives them.
        how: name of the convention.
        intervals: add to the details of "all" how far it depends on the test images.
    """
    measured = measured[measured["convention"] == how]
    last = measured[measured["step"] == measured["steps"] - 1]
    means = measured[measured["quantity"] == "all"]
    first = first_channel(section, last, how)
    conditions = _usual_conditions(section.chains)
    memory = any(chain.memory for chain in section.chains)
    found = by(last[last["quantity"] != "iou"], "quantity")
    chains = sorted(section.chains, key=lambda c: c.at_once)
    rows = []
    for chain in chains:
        n = len(chain.finals)
        cells = [_cell(found.get((chain.label, quantity), ()), n) for quantity in QUANTITIES]
        if intervals and chain.finals:
            cells = [replace(c, detail=c.detail + _interval(chain, how)) if q == "all" else c for q, c in zip(QUANTITIES, cells, strict=True)]
        cells += [Cell(str(n))] + [Cell(str(chain.memory or NONE))] * memory
        rows.append(Row(chain.title, tuple(cells), tuple(_notes(chain, conditions, means)), chain.at_once))
    takes_part = [not chain.at_once and _conditions(chain) == conditions for chain in chains]
    columns = (
        "method", f"old ({span(first, section.n_first - 1)})", f"new ({span(section.n_first, section.n_classes - 1)})",
        f"all ({span(first, section.n_classes - 1)})", "avg", "n", *(["memory"] * memory),
    )  # fmt: skip
    return Table(
        f"{section.name}-{section.track}",
        f"{section.title or section.name}; {section.setting}; track {section.track}; {section.data_title}",
        columns,
        tuple(_rank(rows, takes_part, len(QUANTITIES))),
        tuple(_says(section, how, first, any(row.apart for row in rows), any(len(chain.finals) == 1 for chain in section.chains))),
    )


def first_channel(section: Section, last: pd.DataFrame, how: str) -> int:
    """0 if background is in the means, else 1. The numbers tell: on some data sets it is never scored, whatever the convention says."""
    channels = last[last["quantity"] == "iou"]["channel"]
    return 0 if (channels == 0).any() or (channels.empty and convention(how).background) else 1


def by(measured: pd.DataFrame, column: str) -> dict[tuple[str, Any], list[tuple[int, float, str]]]:
    """Measurements (seed, value, job) of every method and every value of a column."""
    found: dict[tuple[str, Any], list[tuple[int, float, str]]] = {}
    for method, what, *measurement in zip(*(measured[name] for name in ("method", column, "seed", "value", "key")), strict=True):
        found.setdefault((method, what), []).append((measurement[0], measurement[1], measurement[2]))
    return found


def _cell(measurements: Sequence[tuple[int, float, str]], usual: int) -> Cell:
    """Mean over seeds; where fewer seeds have this quantity than the row has seeds, the cell says so."""
    if not measurements:
        return Cell()
    values = [value for _, value, _ in measurements]
    detail = "\n".join(f"seed {seed}: {value:.2f}, job {key}" for seed, value, key in measurements)
    return Cell(with_n(number(values), len(values), usual), mean(values), len(values), "", detail)


def with_n(text: str, n: int, usual: int) -> str:
    """A number that says how many seeds it has if that is not the usual count."""
    return text if n == usual else f"{text} (n={n})"


def _interval(chain: Chain, how: str) -> str:
    found = interval(chain.finals, convention(how))
    return f"\n{COVERAGE} % interval over test images: {found[0]:.1f} to {found[1]:.1f}" if found else ""


def _rank(rows: Sequence[Row], takes_part: Sequence[bool], n_columns: int) -> list[Row]:
    """Rows with the first columns ranked, among those that take part."""
    cells = [list(row.cells) for row in rows]
    part = [i for i, takes in enumerate(takes_part) if takes]
    for column in range(n_columns):
        for i, cell in zip(part, ranked([cells[i][column] for i in part]), strict=True):
            cells[i][column] = cell
    return [replace(row, cells=tuple(c)) for row, c in zip(rows, cells, strict=True)]


def _conditions(chain: Chain) -> tuple[str, int]:
    """What two rows must share to share a rank: the network, and the number of exemplars kept."""
    return chain.network, chain.memory


def _usual_conditions(chains: Iterable[Chain]) -> tuple[str, int]:
    """The conditions that most rows have; the smaller memory, then the earlier row, where two are equally frequent."""
    count = Counter(_conditions(chain) for chain in chains if not chain.at_once and chain.finals)
    return min(count, key=lambda c: (-count[c], c[1]), default=("", 0))


def _notes(chain: Chain, usual: tuple[str, int], means: pd.DataFrame) -> list[str]:
    """Footnotes of a row: the method's own, what keeps it out of the ranking, and what is not finished.

    Args:
        usual: conditions of most rows.
        means: mIoU all after each step of each seed.
    """
    notes = list(chain.footnotes)
    network, memory = usual
    verdict = "" if chain.at_once else ": not ranked with them"
    if network and chain.network != network:
        notes.append(f"network {chain.network}, most rows have {network}{verdict}")
    if network and chain.memory != memory and not chain.at_once:
        notes.append(f"keeps {chain.memory or 'no'} exemplars, most rows {memory or 'none'}{verdict}")
    if any(result.inputs.get("smoke") for result in chain.results):
        notes.append(SMOKE)
    if differing := _differing(chain):
        notes.append(f"its seeds were not trained alike: {', '.join(differing)} differ")
    unfinished = [_so_far(chain, seed, means) for seed in chain.seeds if len(chain.by_seed.get(seed, ())) < chain.steps]
    if unfinished:
        notes.append(f"not finished: {', '.join(unfinished)}")
    if chain.stale:
        places = ", ".join(f"seed {result.seed} step {result.step}" for result in chain.stale)
        notes.append(f"left out, since trained under earlier settings: {places}")
    return notes


def _so_far(chain: Chain, seed: int, means: pd.DataFrame) -> str:
    """ "seed 1 (2 of 3 steps, all 61.3 after step 1)": what is there of a chain."""
    done = len(chain.by_seed.get(seed, ()))
    mine = means[(means["method"] == chain.label) & (means["seed"] == seed)]
    so_far = [f", all {number([value])} after step {step}" for step, value in zip(mine["step"], mine["value"], strict=True)]
    return f"seed {seed} ({done} of {chain.steps} steps{so_far[-1] if so_far else ''})"


def _differing(chain: Chain) -> list[str]:
    """Names of the inputs, seed and parent aside, in which the jobs of the averaged seeds differ at any step."""
    seeds = [result.seed for result in chain.finals]
    found = set()
    for step in range(chain.steps):
        jobs = [_flat(result.inputs) for seed in seeds for result in chain.by_seed[seed] if result.step == step]
        names = {name for job in jobs for name in job} - {"seed", "parent"}
        found |= {name for name in names if any(job.get(name) != jobs[0].get(name) for job in jobs)}
    return sorted(found)


def _flat(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested inputs by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def _says(section: Section, how: str, first: int, bound: bool, single: bool) -> list[str]:
    background = "background and " if first == 0 else ""
    lines = [
        "mIoU in percent, mean ± standard deviation over n seeds" + ("; n = 1 is one run, whose spread is not known" if single else ""),
        f"old: {background}{_classes(len(section.groups[0]))} of step 0; new: {_classes(section.n_classes - section.n_first)} added since; "
        f"all: both, after the last step; avg: mean of all over the {len(section.groups)} steps; classes counted in the protocol's order",
        f"convention {how}: {convention(how).says}",
    ]
    if section.overrides:
        lines.append(_overrides(section))
    if bound:
        lines.append("the last row learns all classes at once: it is the upper bound and takes no part in the ranking")
    return lines


def _overrides(section: Section) -> str:
    return f"every row with {section.overrides}"


def _classes(n: int) -> str:
    return "1 class" if n == 1 else f"{n} classes"


# ---- several protocols ---------------------------------------------------------------------------------------------------


def overview(summaries: Sequence[tuple[Section, Table]], how: str) -> list[Table]:
    """Methods x protocols, mIoU all: one table for each track and data set, its numbers and ranks those of the protocols' tables.

    Args:
        summaries: each section with its table.
        how: name of the convention that they follow.
    """
    groups: dict[tuple[str, str, str], list[tuple[Section, Table]]] = {}
    for section, table in summaries:
        groups.setdefault((section.track, section.data_set, section.data), []).append((section, table))
    return [_overview(parts, how) for parts in groups.values()]


def _overview(parts: Sequence[tuple[Section, Table]], how: str) -> Table:
    column = QUANTITIES.index("all")
    section = parts[0][0]
    found: dict[str, dict[int, Row]] = {}
    for i, (_, table) in enumerate(parts):
        for row in table.rows:
            found.setdefault(row.title, {})[i] = row
    counts = Counter(row.cells[column].n for rows in found.values() for row in rows.values() if row.cells[column].n)
    usual = max(counts, key=lambda n: (counts[n], n), default=0)
    lines = []
    for title, rows in found.items():
        shared = [note for note in next(iter(rows.values())).notes if all(note in row.notes for row in rows.values())]
        cells = []
        for i in range(len(parts)):
            cell = rows[i].cells[column] if i in rows else Cell()
            own = tuple(note for note in rows[i].notes if note not in shared) if i in rows else ()
            cells.append(replace(cell, text=with_n(cell.text, cell.n, usual) if cell.n else NONE, notes=own))
        lines.append(Row(title, tuple(cells), tuple(shared), all(row.apart for row in rows.values())))
    says = [
        f"mIoU in percent over all classes after the last step (column all of each protocol's table), n = {usual} unless a cell says otherwise",
        f"convention {how}: {convention(how).says}",
    ]
    if section.overrides:
        says.append(_overrides(section))
    return Table(
        f"overview-{section.data_set}-{section.track}-{section.data[:6]}",
        f"mIoU all on {section.data_title}; track {section.track}",
        ("method", *(s.name for s, _ in parts)),
        tuple(sorted(lines, key=lambda row: row.apart)),
        tuple(says),
    )


# ---- classes and jobs ----------------------------------------------------------------------------------------------------


def per_class(section: Section, measured: pd.DataFrame, how: str) -> Table:
    """Classes x methods: IoU after the last step."""
    last = measured[(measured["convention"] == how) & (measured["step"] == measured["steps"] - 1) & (measured["quantity"] == "iou")]
    chains = [chain for chain in sorted(section.chains, key=lambda c: c.at_once) if chain.finals]
    names: Sequence[str] = next((chain.finals[0].metrics["classes"] for chain in chains), [])
    step_of = [0, *(t for t, group in enumerate(section.groups) for _ in group)]
    found = by(last, "channel")
    rows = []
    for channel, name in enumerate(names):
        cells = [_cell(found.get((chain.label, channel), ()), len(chain.finals)) for chain in chains]
        rows.append(Row(f"{channel} {name}", (Cell(str(step_of[channel])), *cells)))
    columns = ("class", "step", *(chain.title for chain in chains))
    return Table(f"classes-{section.name}-{section.track}", "IoU of each class after the last step, in percent", columns, tuple(rows))


def jobs(section: Section) -> Table:
    """The jobs behind a section's numbers: chain by chain, with when, with which code and on what they ran."""
    rows = []
    for chain in section.chains:
        for result in chain.results:
            rows.append(Row(chain.title, (Cell(str(result.seed)), Cell(str(result.step)), Cell(result.key), *_circumstances(result))))
    return Table(
        f"jobs-{section.name}-{section.track}",
        "Jobs behind these numbers; results/jobs/<key> holds each",
        ("method", "seed", "step", "job", "network", "finished", "code", "on"),
        tuple(rows),
    )


def _circumstances(result: Result) -> list[Cell]:
    ran = read_json(result.folder / "environment.json") or {}
    code = ran.get("commit") or ran.get("packages", {}).get("ciss-bench")
    return [Cell(str(text or NONE)) for text in (result.network, ran.get("finished"), code, ran.get("gpu") or ran.get("machine"))]
