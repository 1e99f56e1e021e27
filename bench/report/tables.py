"""Tables as values: what stands in which cell, and which one is best. How they look is render.py's concern.

Rules of a table:

* Its numbers are means over the seeds that finished every step; a chain under way is named in a footnote,
  with what it has so far.
* The best number of a column and the second are marked, as printed. Methods that learn all classes at once
  (Joint) take no part: they are the upper bound and stand apart. Neither do rows under other conditions
  (network, exemplar memory, kind of device, version of torch) than most rows have; a footnote says so. Rows
  measured on another device or torch come after the others.
* Identical footnotes share a number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean, stdev

import pandas as pd

from bench.report.collect import QUANTITIES, Chain, Result, Section
from bench.report.notes import conditions, footnotes, usual_conditions, usual_driver
from bench.score.bootstrap import COVERAGE, interval
from bench.score.conventions import convention
from bench.score.counts import read_counts
from bench.store.changes import engine_line, listed

NONE = "-"
"""What a cell without a number says."""


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
        texts = (
            note
            for row in self.rows
            for notes in (row.notes, *(cell.notes for cell in row.cells))
            for note in notes
        )
        return list(dict.fromkeys(texts))

    def marks(self, notes: Iterable[str]) -> list[int]:
        """Numbers of some footnotes, ascending."""
        return sorted(self.notes.index(note) + 1 for note in set(notes))


def number(values: Sequence[float]) -> str:
    """Percentages of several seeds as tables print them: the mean, ± sample standard deviation if several."""
    if not values:
        return NONE
    return f"{mean(values):.1f}" if len(values) == 1 else f"{mean(values):.1f} ± {stdev(values):.1f}"


def span(first: int, last: int) -> str:
    """ "0-6", "7", or "none"."""
    return "none" if last < first else str(first) if first == last else f"{first}-{last}"


def ranked(cells: Sequence[Cell]) -> list[Cell]:
    """The same cells with the best and the second number marked, as printed: equal numbers share a rank."""
    printed = sorted({round(cell.value, 1) for cell in cells if cell.value is not None}, reverse=True)
    ranks = dict(zip(printed, ("best", "second"), strict=False)) if len(printed) > 1 else {}
    return [
        replace(cell, rank="" if cell.value is None else ranks.get(round(cell.value, 1), ""))
        for cell in cells
    ]


# ---- one protocol ------------------------------------------------------------------------------------------


def summary(section: Section, measured: pd.DataFrame, how: str, intervals: bool = False) -> Table:
    """Methods x old, new, all and avg of a section.

    Args:
        section: which one.
        measured: its numbers, as `numbers` gives them.
        how: name of the convention.
        intervals: add to the details of "all" how far it depends on the test images.
    """
    measured = measured[measured["convention"] == how]
    last = measured[measured["step"] == measured["steps"] - 1]
    means = measured[measured["quantity"] == "all"]
    first = first_channel(section, last, how)
    usual, driver = usual_conditions(section.chains), usual_driver(section.chains)
    memory = any(chain.memory for chain in section.chains)
    found = by(last[last["quantity"] != "iou"], "quantity")
    chains = sorted(section.chains, key=lambda c: (c.at_once, conditions(c).on != usual.on, conditions(c).on))
    rows = []
    for chain in chains:
        n = len(chain.finals)
        cells = [_cell(found.get((chain.label, quantity), ()), n) for quantity in QUANTITIES]
        if intervals and chain.finals:
            cells = [
                replace(c, detail=c.detail + _interval(chain, how)) if q == "all" else c
                for q, c in zip(QUANTITIES, cells, strict=True)
            ]
        cells += [Cell(str(n))] + [Cell(str(chain.memory or NONE))] * memory
        rows.append(
            Row(chain.title, tuple(cells), tuple(footnotes(chain, usual, means, driver)), chain.at_once)
        )
    takes_part = [not chain.at_once and conditions(chain) == usual for chain in chains]
    columns = (
        "method",
        f"old ({span(first, section.n_first - 1)})",
        f"new ({span(section.n_first, section.n_classes - 1)})",
        f"all ({span(first, section.n_classes - 1)})",
        "avg",
        "n",
        *(["memory"] * memory),
    )
    return Table(
        f"{section.name}-{section.track}",
        f"{section.title or section.name}; {section.setting}; track {section.track}; {section.data_title}",
        columns,
        tuple(_rank(rows, takes_part, len(QUANTITIES))),
        tuple(_says(section, how, first)),
    )


def first_channel(section: Section, last: pd.DataFrame, how: str) -> int:
    """0 if background is in "all", else 1.

    The numbers tell: on some data sets it is never scored, whatever the convention says.
    """
    iou = last[last["quantity"] == "iou"]
    background = iou[iou["channel"] == 0]["value"]
    if convention(how).absent == "nonzero":
        background = background[background != 0]
    return 0 if len(background) or (iou.empty and convention(how).background) else 1


def by(measured: pd.DataFrame, column: str) -> dict[tuple[str, object], list[tuple[int, float, str]]]:
    """Measurements (seed, value, job) of every method and every value of a column."""
    found: dict[tuple[str, object], list[tuple[int, float, str]]] = {}
    columns = (measured[name] for name in ("method", column, "seed", "value", "key"))
    for method, what, seed, value, key in zip(*columns, strict=True):
        found.setdefault((method, what), []).append((seed, value, key))
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
    finals = chain.finals
    counts = [read_counts(result.folder / "confusion.npz") for result in finals]
    steps = [result.job.protocol.step(result.job.step) for result in finals]
    found = interval(counts, convention(how), finals[0].job.protocol.dataset, steps)
    return f"\n{COVERAGE} % interval over test images: {found[0]:.1f} to {found[1]:.1f}" if found else ""


def _rank(rows: Sequence[Row], takes_part: Sequence[bool], n_columns: int) -> list[Row]:
    """Rows with the first columns ranked, among those that take part."""
    cells = [list(row.cells) for row in rows]
    part = [i for i, takes in enumerate(takes_part) if takes]
    for column in range(n_columns):
        for i, cell in zip(part, ranked([cells[i][column] for i in part]), strict=True):
            cells[i][column] = cell
    return [replace(row, cells=tuple(c)) for row, c in zip(rows, cells, strict=True)]


def _says(section: Section, how: str, first: int) -> list[str]:
    single = any(len(chain.finals) == 1 for chain in section.chains)
    spread = "; n = 1 is one run, whose spread is not known" if single else ""
    background = "background and " if first == 0 else ""
    old, new = _classes(section.n_first - 1), _classes(section.n_classes - section.n_first)
    lines = [
        f"mIoU in percent, mean ± standard deviation over n seeds{spread}",
        f"old: {background}{old} of step 0; new: {new} added since; all: both, after the last step; "
        f"avg: mean of all over the {len(section.groups)} steps; classes counted in the protocol's order",
        f"convention {how}: {convention(how).says}",
    ]
    if section.overrides:
        lines.append(_overrides(section))
    if any(chain.at_once for chain in section.chains):
        lines.append(
            "the last row learns all classes at once: it is the upper bound and takes no part in the ranking"
        )
    ran = {result.key: result.change.engine for chain in section.chains for result in chain.results}
    if engine := engine_line(ran.values()):
        lines.append(engine)
    return lines


def _overrides(section: Section) -> str:
    return f"every row with {section.overrides}"


def _classes(n: int) -> str:
    return "1 class" if n == 1 else f"{n} classes"


# ---- several protocols -------------------------------------------------------------------------------------


def overview(summaries: Sequence[tuple[Section, Table]], how: str) -> list[Table]:
    """Methods x protocols, mIoU all: one table for each track and data set.

    Its numbers and ranks are those of the protocols' tables.

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
    sizes = [row.cells[column].n for rows in found.values() for row in rows.values()]
    counts = Counter(n for n in sizes if n)
    usual = max(counts, key=lambda n: (counts[n], n), default=0)
    lines = []
    for title, rows in found.items():
        first, *others = rows.values()
        shared = [note for note in first.notes if all(note in row.notes for row in others)]
        cells = []
        for i in range(len(parts)):
            cell = rows[i].cells[column] if i in rows else Cell()
            own = tuple(note for note in rows[i].notes if note not in shared) if i in rows else ()
            cells.append(replace(cell, text=with_n(cell.text, cell.n, usual) if cell.n else NONE, notes=own))
        lines.append(Row(title, tuple(cells), tuple(shared), all(row.apart for row in rows.values())))
    says = [
        "mIoU in percent over all classes after the last step (column all of each protocol's table), "
        f"n = {usual} unless a cell says otherwise",
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


# ---- classes and jobs --------------------------------------------------------------------------------------


def per_class(section: Section, measured: pd.DataFrame, how: str) -> Table:
    """Classes x methods: IoU after the last step."""
    ious = measured[(measured["convention"] == how) & (measured["quantity"] == "iou")]
    last = ious[ious["step"] == ious["steps"] - 1]
    chains = [chain for chain in sorted(section.chains, key=lambda c: c.at_once) if chain.finals]
    names: Sequence[str] = next((chain.finals[0].metrics.classes for chain in chains), [])
    step_of = [0, *(t for t, group in enumerate(section.groups) for _ in group)]
    found = by(last, "channel")
    rows = []
    for channel, name in enumerate(names):
        cells = [_cell(found.get((chain.label, channel), ()), len(chain.finals)) for chain in chains]
        rows.append(Row(f"{channel} {name}", (Cell(str(step_of[channel])), *cells)))
    columns = ("class", "step", *(chain.title for chain in chains))
    caption = "IoU of each class after the last step, in percent"
    return Table(f"classes-{section.name}-{section.track}", caption, columns, tuple(rows))


def jobs(section: Section) -> Table:
    """The jobs behind a section's numbers: chain by chain, with when, with which code, on what they ran."""
    rows = []
    for chain in section.chains:
        for result in chain.results:
            where = (Cell(str(result.seed)), Cell(str(result.step)), Cell(result.key))
            rows.append(Row(chain.title, (*where, *_circumstances(result))))
    return Table(
        f"jobs-{section.name}-{section.track}",
        "Jobs behind these numbers; results/jobs/<key> holds each",
        ("method", "seed", "step", "job", "network", "finished", "code", "on"),
        tuple(rows),
    )


def _circumstances(result: Result) -> list[Cell]:
    """Cells: network, when it ended, with which code, and on what it ran."""
    ran = result.ran
    code = [ran.packages.get("ciss-bench") and f"ciss-bench {ran.packages['ciss-bench']}", ran.commit]
    changed = result.change.files and f"{listed(result.change.files)} changed since"
    on = [ran.gpu or ran.machine, ran.driver and f"driver {ran.driver}", ran.torch and f"torch {ran.torch}"]
    words = (result.network, ran.finished, _words(*code, changed), _words(*on))
    return [Cell(text or NONE) for text in words]


def _words(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part)
