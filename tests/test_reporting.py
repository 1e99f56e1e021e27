"""Reports: from artifacts with known counts to the numbers, marks and words of every format."""

from __future__ import annotations

import csv
import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import metrics
from bench.data.dataset import load_dataset
from bench.data.index import ClassIndex
from bench.errors import UserError
from bench.launch import Driver, make_executor, record
from bench.plan import Job, Plan, make_plan
from bench.protocol import Protocol
from bench.reporting import bootstrap, figures, render, tables, terminal_text
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


@pytest.fixture
def world(in_tmp: Path) -> World:
    return World(Store(in_tmp / "results"))


def row(table: tables.Table, title: str) -> dict[str, str]:
    """A row by column: "old", "new", "all", "avg", "n"."""
    (found,) = [r for r in table.rows if r.title == title]
    return {column.partition(" ")[0]: cell.text for column, cell in zip(table.columns[1:], found.cells, strict=True)}


def ranks(table: tables.Table) -> dict[str, list[str]]:
    return {r.title: [cell.rank for cell in r.cells[:4]] for r in table.rows}


def notes(table: tables.Table, title: str) -> tuple[str, ...]:
    (found,) = [r for r in table.rows if r.title == title]
    return found.notes


# ---- numbers -------------------------------------------------------------------------------------------------------------


def test_a_row_holds_the_means_of_the_last_step_and_avg_over_steps(world: World) -> None:
    world.finish("mib", GOOD)
    assert world.table().columns == ("method", "old (0-1)", "new (2)", "all (0-2)", "avg", "n")
    assert row(world.table(), "MiB") == {"old": "87.5", "new": "66.7", "all": "80.6", "avg": "75.7", "n": "1"}


def test_another_convention_gives_other_numbers_headers_and_words(world: World) -> None:
    world.finish("mib", GOOD)
    table = world.table("mib")
    assert table.columns[1:4] == ("old (1)", "new (2)", "all (1-2)")
    assert row(table, "MiB") == {"old": "75.0", "new": "66.7", "all": "70.8", "avg": "85.4", "n": "1"}
    assert any(line.startswith("convention mib: background not in the mean") for line in table.says)
    assert any(line.startswith("old: 1 class of step 0; new: 1 class added since") for line in table.says)


def test_a_background_that_is_never_scored_is_not_in_the_header(world: World) -> None:
    ade = load_dataset("ade")
    protocol = Protocol("ade-tiny", ade, "overlapped", ((1,), (2,)))
    world.finish("mib", GOOD, protocol=protocol)
    assert world.table("mbs").columns[1] == "old (1)"  # MBS ignores unlabelled pixels, though its convention averages background
    assert world.table("default").columns[1] == "old (0-1)"


def test_seeds_give_mean_and_sample_standard_deviation(world: World) -> None:
    world.finish("mib", GOOD, seeds=[0])
    world.finish("mib", BAD, seeds=[1])
    found = row(world.table(), "MiB")
    # all: 80.556 and 34.848; mean 57.702, sd 45.707 / sqrt(2) = 32.320
    assert (found["all"], found["n"]) == ("57.7 ± 32.3", "2")
    assert found["new"] == "58.3 ± 11.8"
    assert not any("n = 1" in line for line in world.table().says)


def test_joint_is_divided_by_the_protocols_steps_and_stands_apart_unranked(world: World) -> None:
    world.finish("joint", {1: PERFECT})
    world.finish(["mib", "ft"], GOOD)
    table = world.table()
    assert [r.title for r in table.rows] == ["MiB", "FT", "Joint"]
    assert table.rows[-1].apart
    assert row(table, "Joint") == {"old": "100.0", "new": "100.0", "all": "100.0", "avg": "-", "n": "1"}
    assert ranks(table)["Joint"] == ["", "", "", ""]
    assert any("upper bound" in line for line in table.says)


def test_joint_with_mistakes_has_the_protocols_old_and_new(world: World) -> None:
    world.finish("joint", {1: LAST})
    assert row(world.table(), "Joint") == {"old": "87.5", "new": "66.7", "all": "80.6", "avg": "-", "n": "1"}


def test_the_best_and_the_second_of_each_column_are_marked(world: World) -> None:
    world.finish("ft", BAD)
    world.finish("mib", GOOD)
    world.finish("lwf", {0: FIRST, 1: {(0, 0): 60, (1, 1): 40, (2, 0): 20}})  # IoU 3/4, 1, 0
    assert row(world.table(), "LwF")["old"] == "87.5"
    assert ranks(world.table()) == {
        "FT": ["second", "second", "", ""],
        "MiB": ["best", "best", "best", "best"],
        "LwF": ["best", "", "second", "second"],
    }


def test_a_lone_row_and_equal_rows_are_not_marked(world: World) -> None:
    world.finish("mib", GOOD)
    assert ranks(world.table()) == {"MiB": ["", "", "", ""]}
    world.finish("ft", GOOD)
    assert ranks(world.table())["FT"] == ["", "", "", ""]


def test_numbers_that_print_alike_have_the_same_rank() -> None:
    cells = [tables.Cell(value=v) for v in (61.34, 61.26, 60.0, 59.0)]
    assert [c.rank for c in tables.ranked(cells)] == ["best", "best", "second", ""]


# ---- what is not finished, or not alike ----------------------------------------------------------------------------------


def test_an_unfinished_seed_is_named_and_not_averaged(world: World) -> None:
    world.finish("mib", GOOD, seeds=[0])
    world.finish("mib", BAD, seeds=[1], steps=1)
    world.finish("mib", BAD, seeds=[2], steps=0)
    assert row(world.table(), "MiB")["all"] == "80.6"
    assert row(world.table(), "MiB")["n"] == "1"
    assert notes(world.table(), "MiB") == ("not finished: seed 1 (1 of 2 steps, all 70.8 after step 0), seed 2 (0 of 2 steps)",)


def test_a_method_without_a_finished_seed_has_a_row_without_numbers(world: World) -> None:
    world.finish("ft", GOOD)
    world.finish("mib", GOOD, steps=1)
    assert row(world.table(), "MiB") == {"old": "-", "new": "-", "all": "-", "avg": "-", "n": "0"}
    assert "1 of 2 steps" in notes(world.table(), "MiB")[0]
    assert notes(world.table(), "FT") == ()


def test_avg_without_every_step_says_how_many_seeds_it_has(world: World) -> None:
    plan = world.finish("mib", GOOD, seeds=[0, 1])
    (world.store.root / "tiny/small/mib/seed-1/step-0").unlink()
    assert plan.jobs
    found = row(world.table(), "MiB")
    assert (found["all"], found["avg"]) == ("80.6 ± 0.0", "75.7 (n=1)")
    assert notes(world.table(), "MiB") == ("not finished: seed 1 (1 of 2 steps, all 80.6 after step 1)",)


def test_a_step_that_does_not_build_on_the_one_before_it_is_left_out(world: World) -> None:
    keys = {c.seed: c.keys for c in world.finish("mib", GOOD, seeds=[0, 1]).chains}
    world.store.link("tiny/small/mib/seed-0/step-1", keys[1][1])
    table = world.table()
    assert row(table, "MiB")["n"] == "1"
    assert "left out, since trained under earlier settings: seed 0 step 1" in notes(table, "MiB")


def test_seeds_that_were_not_trained_alike_are_named(world: World) -> None:
    world.finish("mib", GOOD, seeds=[0, 1])
    (other,) = world.finish("mib", GOOD, seeds=[1], overrides=["mib.distillation=20"]).chains
    world.store.link("tiny/small/mib/seed-1/step-1", other.keys[1])
    assert "its seeds were not trained alike: method.distillation differ" in notes(world.table(), "MiB")


def test_another_class_order_under_the_same_name_has_a_table_of_its_own(world: World) -> None:
    world.finish("mib", GOOD)
    world.finish("ft", {0: {(0, 0): 60, (2, 2): 20}, 1: PERFECT}, protocol=replace(TINY, groups=((2,), (1,))))
    sections = collect(world.store)
    assert [(s.groups, [c.title for c in s.chains]) for s in sections] == [(((1,), (2,)), ["MiB"]), (((2,), (1,)), ["FT"])]
    assert [s.name.partition("~")[:2] for s in sections] == [("tiny", ""), ("tiny", "~")]  # so that links and CSV rows tell them apart


def test_results_on_other_data_stand_in_other_tables(world: World, tmp_path: Path) -> None:
    world.finish("mib", GOOD)
    world.finish("ft", GOOD, fingerprint="e" * 16)
    sections = collect(world.store, ["tiny"])
    first, second = (s.name for s in sections)
    assert (first, second[:5]) == ("tiny", "tiny~")
    overview = tables.overview([(s, tables.summary(s, numbers([s]), "default")) for s in sections], "default")
    assert [t.columns for t in overview] == [("method", first), ("method", second)]


def test_tracks_never_share_a_table(world: World) -> None:
    world.finish("mib", GOOD, track="small")
    world.finish("mib", GOOD, track="controlled")
    assert [s.track for s in collect(world.store)] == ["controlled", "small"]


def test_another_network_is_named_and_not_ranked(world: World) -> None:
    world.finish("ft", BAD)
    world.finish("lwf", GOOD)
    world.finish("mib", {0: FIRST, 1: PERFECT}, overrides=["mib.network=deeplab-resnet18"])
    table, title = world.table(), "MiB [network=deeplab-resnet18]"
    assert ranks(table)[title] == ["", "", "", ""]
    assert ranks(table)["LwF"][:3] == ["best", "best", "best"]
    assert "network deeplab-resnet18, most rows have small: not ranked with them" in notes(table, title)


def test_exemplar_memory_is_a_column_and_keeps_a_row_out_of_the_ranking(world: World) -> None:
    world.finish("ft", BAD)
    world.finish("mib", GOOD)
    world.finish("lwf", {0: FIRST, 1: PERFECT}, memory=100)
    table = world.table()
    assert table.columns[-1] == "memory"
    assert [row(table, title)["memory"] for title in ("FT", "MiB", "LwF")] == ["-", "-", "100"]
    assert "keeps 100 exemplars, most rows none: not ranked with them" in notes(table, "LwF")
    assert ranks(table)["MiB"][:3] == ["best", "best", "best"]


def test_smoke_runs_are_marked(world: World) -> None:
    world.finish("mib", GOOD, smoke=True)
    assert notes(world.table(), "MiB") == (tables.SMOKE,)


# ---- titles, order, footnotes --------------------------------------------------------------------------------------------


def test_rows_stand_in_the_order_in_which_they_were_asked_for(world: World) -> None:
    world.finish(["mib", "lwf", "ft"], GOOD)
    assert [r.title for r in world.table().rows] == ["MiB", "LwF", "FT"]


def test_overrides_are_in_the_title_unless_every_row_has_the_same(world: World) -> None:
    world.finish(["mib", "ft"], GOOD, overrides=["epochs=3"])
    assert [r.title for r in world.table().rows] == ["MiB", "FT"]
    assert "every row with epochs=3" in world.table().says
    world.finish("ft", GOOD)
    assert [r.title for r in world.table().rows] == ["MiB [epochs=3]", "FT [epochs=3]", "FT"]


def test_identical_footnotes_share_a_number() -> None:
    rows = (
        tables.Row("a", (tables.Cell("1"),), ("void", "memory")),
        tables.Row("b", (tables.Cell("2", notes=("late",)),), ("memory",)),
        tables.Row("c", (tables.Cell("3"),), ("new", "void")),
    )
    table = tables.Table("t", "t", ("method", "x"), rows)
    assert table.notes == ["void", "memory", "late", "new"]
    assert [table.marks(r.notes) for r in rows] == [[1, 2], [2], [1, 4]]
    text = render.text_table(table)
    assert "a [1,2]" in text
    assert "2 [3]" in text
    assert "[4] new" in text


def test_the_overview_puts_protocols_side_by_side(world: World) -> None:
    world.finish(["joint", "mib", "ft"], GOOD)
    world.finish(["ft"], BAD, protocol=replace(TINY, name="tiny-b"), seeds=[1, 2])
    world.finish(["mib"], GOOD, protocol=replace(TINY, name="tiny-b"), seeds=[0])
    world.finish(["mib"], GOOD, protocol=replace(TINY, name="tiny-b"), seeds=[1], steps=1)
    for protocol in (TINY, replace(TINY, name="tiny-b")):
        world.finish(["lwf"], GOOD, protocol=protocol, memory=10)
    sections = collect(world.store)
    (table,) = tables.overview([(s, tables.summary(s, numbers([s]), "default")) for s in sections], "default")
    assert table.columns == ("method", "tiny", "tiny-b")
    assert {r.title: [c.text for c in r.cells] for r in table.rows} == {
        "MiB": ["80.6", "80.6"],
        "FT": ["80.6", "34.8 ± 0.0 (n=2)"],
        "LwF": ["80.6", "80.6"],
        "Joint": ["80.6", "-"],
    }
    assert table.rows[-1].title == "Joint"
    assert table.rows[0].cells[1].rank == "best"
    unfinished, memory = table.notes
    assert unfinished == "not finished: seed 1 (1 of 2 steps, all 70.8 after step 0)"
    assert {r.title: (r.notes, [c.notes for c in r.cells]) for r in table.rows} == {
        "MiB": ((), [(), (unfinished,)]),
        "FT": ((), [(), ()]),
        "LwF": ((memory,), [(), ()]),  # the same in both protocols: at the title
        "Joint": ((), [(), ()]),
    }


def test_iou_of_each_class(world: World) -> None:
    world.finish("mib", GOOD)
    world.finish("mib", BAD, seeds=[1])
    section = world.section()
    table = tables.per_class(section, numbers([section]), "default")
    assert table.columns == ("class", "step", "MiB")
    assert [(r.title, [c.text for c in r.cells]) for r in table.rows] == [
        ("0 background", ["0", "77.3 ± 32.1"]),
        ("1 disc", ["0", "37.5 ± 53.0"]),
        ("2 box", ["1", "58.3 ± 11.8"]),
    ]


# ---- formats -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(world: World) -> World:
    """Three methods and the bound, two seeds, footnotes."""
    for seed, pixels in ((0, GOOD), (1, BAD)):
        world.finish(["joint", "ft", "mib"], pixels, seeds=[seed])
        world.finish("lwf", {0: FIRST, 1: PERFECT}, seeds=[seed], memory=10)
    return world


def test_all_formats_hold_the_same_numbers(several: World, tmp_path: Path) -> None:
    paths = render.render_all(several.store, tmp_path / "reports")
    assert {kind: path.name for kind, path in paths.items()} == {
        "markdown": "report.md", "html": "report.html", "latex": "report.tex", "csv": "report.csv",
    }  # fmt: skip
    text = {kind: path.read_text(encoding="utf-8") for kind, path in paths.items()}
    measured = list(csv.DictReader(text["csv"].splitlines()))
    for r in several.table().rows:
        for quantity, printed in row(several.table(), r.title).items():
            if quantity not in tables.QUANTITIES or printed == tables.NONE:
                continue
            assert printed in text["markdown"]
            assert printed in text["html"]
            assert printed.replace("±", r"$\pm$") in text["latex"]
            last = [
                m for m in measured
                if (m["title"], m["quantity"], m["convention"]) == (r.title, quantity, "default") and int(m["step"]) == int(m["steps"]) - 1
            ]  # fmt: skip
            assert tables.number([float(m["value"]) for m in last]) == printed
            for m in last:
                for key in m["key"].split():
                    assert several.store.done(key)
                    assert key in text["html"]


def test_the_csv_has_every_seed_step_convention_and_class_once(several: World, tmp_path: Path) -> None:
    path = render.render_all(several.store, tmp_path)["csv"]
    measured = list(csv.DictReader(path.read_text().splitlines()))
    place = ("protocol", "track", "method", "seed", "step", "convention", "quantity", "class")
    assert len({tuple(m[name] for name in place) for m in measured}) == len(measured)
    found = {m["quantity"] + m["class"]: m for m in measured if (m["method"], m["seed"], m["step"], m["convention"]) == ("mib", "1", "1", "mib")}
    assert {what: float(m["value"]) for what, m in found.items()} == pytest.approx(
        {"old": 0, "new": 50, "all": 25, "avg": 62.5, "ioudisc": 0, "ioubox": 50}, abs=1e-4
    )
    assert found["all"]["data"] == "f" * 16 + "-" + "f" * 16
    assert (found["all"]["setting"], found["all"]["network"], found["all"]["memory"]) == ("overlapped", "small", "0")
    assert {m["convention"] for m in measured} == set(metrics.CONVENTIONS)


def test_best_second_and_the_bound_in_each_format(world: World, tmp_path: Path) -> None:
    world.finish("joint", {1: PERFECT})
    world.finish("mib", GOOD)
    world.finish("ft", BAD)
    text = {kind: path.read_text(encoding="utf-8") for kind, path in render.render_all(world.store, tmp_path).items()}
    assert "**80.6**" in text["markdown"]
    assert "<u>34.8</u>" in text["markdown"]
    assert r"\textbf{80.6}" in text["latex"]
    assert r"\underline{34.8}" in text["latex"]
    assert re.search(r"\\midrule\nJoint & 100.0 & 100.0 & 100.0 & - & 1 \\\\\n\\bottomrule", text["latex"])
    assert "<strong>80.6</strong>" in text["html"]
    assert "<u>34.8</u>" in text["html"]
    assert re.search(r'<tr class="apart"><th scope="row">Joint</th>', text["html"])


class Outside(HTMLParser):
    """Collects what a page would load or link to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "data", "action", "srcset", "xlink:href")]


def test_the_page_needs_nothing_from_outside(several: World, tmp_path: Path) -> None:
    page = render.render_all(several.store, tmp_path)["html"].read_text(encoding="utf-8")
    seen = Outside()
    seen.feed(page)
    assert not seen.tags & {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "base", "form"}
    assert seen.targets
    assert all(target.startswith("#") and f'id="{target[1:]}"' in page for target in seen.targets)
    assert "@import" not in page
    assert "url(" not in page
    assert "http" not in page
    assert "svg" in seen.tags
    assert "prefers-color-scheme: dark" in page


def test_what_users_name_is_escaped(world: World, tmp_path: Path) -> None:
    title = r"<script>alert('x')</script> 50 % of A_1 & B | $2^3$ #4 {~} \end *b* `c`"
    world.finish("mib", GOOD, protocol=replace(TINY, title=title))
    text = {kind: path.read_text(encoding="utf-8") for kind, path in render.render_all(world.store, tmp_path).items()}
    assert "<script" not in text["html"]
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; 50 % of A_1 &amp; B" in text["html"]
    assert render.latex(title) in text["latex"]
    assert render.latex(title) == (
        r"\textless{}script\textgreater{}alert('x')\textless{}/script\textgreater{} 50 \% of A\_1 \& B \textbar{} \$2\^{}3\$ \#4 \{\~{}\} "
        r"\textbackslash{}end *b* `c`"
    )
    assert "<script" not in text["markdown"].replace("\\<", "")
    assert r"A\_1 \& B \|" in text["markdown"]


def test_a_curve_has_a_point_a_step_and_the_bound_at_the_end(several: World) -> None:
    section = several.section()
    drawn = figures.lines(section, numbers([section]), "default")
    assert [(line.title, line.steps, line.bound) for line in drawn] == [
        ("FT", (0, 1), False), ("MiB", (0, 1), False), ("LwF", (0, 1), False), ("Joint", (1,), True),
    ]  # fmt: skip
    assert drawn[1].means == pytest.approx([70.8333, 57.7020], abs=1e-3)
    svg = ElementTree.fromstring(figures.curve(section, drawn))
    points = [t.text for t in svg.iter("title") if t.text and "step" in t.text]
    assert len(points) == 3 * 2 + 1
    assert any(p.startswith("MiB, step 1: 57.7 ± 32.3 (n=2), job ") for p in points)
    assert sum(1 for _ in svg.iter("polygon")) >= 3


def test_curves_of_perfect_and_unfinished_chains(world: World) -> None:
    world.finish("ft", {0: {(0, 0): 60, (1, 1): 40}, 1: PERFECT})
    world.finish("mib", {0: {(0, 0): 60, (1, 1): 40}}, steps=1)
    section = world.section()
    drawn = figures.lines(section, numbers([section]), "default")
    assert [(line.title, line.steps) for line in drawn] == [("FT", (0, 1)), ("MiB (1 of 2 steps)", (0,))]
    ElementTree.fromstring(figures.curve(section, drawn))


@given(st.lists(st.floats(0, 300), max_size=15), st.floats(1, 15))
def test_labels_keep_their_distance_and_their_order(wanted: list[float], gap: float) -> None:
    placed = figures.spread_out(sorted(wanted), gap, 0, 300)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(placed))
    assert all(-1e-6 <= position <= 300 + 1e-6 for position in placed)


# ---- bootstrap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", metrics.CONVENTIONS.values(), ids=metrics.CONVENTIONS)
@pytest.mark.parametrize("name", ["shapes", "ade"])
def test_draws_are_what_weighted_counts_would_score(how: metrics.Convention, name: str) -> None:
    rng = np.random.default_rng(0)
    dataset = load_dataset(name)
    step = Protocol("p", dataset, "overlapped", ((3, 1), (2,), (5,))).step(1)
    rows = (*step.seen, *(c for c in range(1, len(dataset.classes)) if c not in step.seen))
    entries = np.array([(i, r, c) for i in range(6) for r in range(7) for c in range(4) if rng.random() < 0.2], np.int32)
    counts = metrics.Counts(tuple("abcdef"), rng.random(6) < 0.7, rows, step.n_classes, entries, rng.integers(1, 50, len(entries)))
    weights = rng.multinomial(6, np.full(6, 1 / 6), size=40)
    expected = [metrics.mean(metrics.score(counts, how, dataset, step, w)) for w in weights]
    np.testing.assert_allclose(bootstrap.draws(counts, how, dataset, step, weights), expected, rtol=1e-12)


def test_the_interval_of_images_that_are_alike_is_a_point(world: World, tmp_path: Path) -> None:
    world.finish("mib", GOOD)
    (chain,) = world.section().chains
    low, high = bootstrap.interval(chain.finals, metrics.CONVENTIONS["default"]) or (0, 0)
    assert (low, high) == pytest.approx((80.5556, 80.5556), abs=1e-3)
    assert "95 % interval over test images: 80.6 to 80.6" in render.render_all(world.store, tmp_path)["html"].read_text()


# ---- terminal, command, errors -------------------------------------------------------------------------------------------


def test_the_terminal_shows_the_protocols_asked_for(several: World) -> None:
    several.finish("ft", GOOD, protocol=replace(TINY, name="elsewhere", title="elsewhere"))
    text = terminal_text(several.store, ["tiny"])
    assert "elsewhere" not in text
    lines = text.splitlines()
    assert lines[0].startswith("tiny: one class, then another; overlapped; track small")
    assert any(re.match(r"Joint +57.4 ± 42.6 +58.3 ± 11.8 +57.7 ± 32.3 +- +2 +-$", line) for line in lines)
    assert any(re.match(r"LwF \[1\] ", line) for line in lines)
    assert any(line.startswith("convention default: ") for line in lines)
    assert terminal_text(several.store, ["nothing"]) == "nothing finished yet of nothing"


def test_the_command_writes_four_files_without_torch(several: World, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom bench.cli import main\nstatus = main(sys.argv[1:])\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'torchvision')], status)"
    )
    arguments = ["report", "--results", str(several.store.root), "--out", "here", "--protocol", "tiny", "--convention", "ssul"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == ["here/report.md", "here/report.html", "here/report.tex", "here/report.csv", "[] 0"]
    assert "convention ssul: " in (tmp_path / "here/report.md").read_text()


def test_nothing_to_report_says_where_and_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"results folder {re.escape(str(tmp_path / 'none'))}: nothing finished.*bench run --protocol"):
        render.render_all(Store(tmp_path / "none"), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ["tinny"]}, "unknown protocol 'tinny'; did you mean 'tiny'"),
        ({"how": "mbi"}, "unknown convention 'mbi'; did you mean 'mib'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(world: World, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    world.finish("mib", GOOD)
    with pytest.raises(UserError, match=re.escape(message)):
        render.render_all(world.store, tmp_path, **options)


def test_a_report_folder_that_is_a_file(world: World, tmp_path: Path) -> None:
    world.finish("mib", GOOD)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written.*--out DIR"):
        render.render_all(world.store, tmp_path / "file")


@pytest.mark.parametrize(
    ("place", "message"),
    [("chain.json", "not there; run bench run for tiny and mib again"), ("seed-0/step-1/job.json", "not there; delete ")],
)
def test_missing_files_are_named(world: World, place: str, message: str) -> None:
    world.finish("mib", GOOD)
    path = world.store.root / "tiny/small/mib" / place
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")):
        collect(world.store)
