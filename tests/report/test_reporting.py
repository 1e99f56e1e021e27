"""Reports: every format, the bootstrap, the terminal, the command."""

from __future__ import annotations

import csv
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import BAD, FIRST, GOOD, PERFECT, TINY, World, row
from hypothesis import given
from hypothesis import strategies as st

from bench.data.dataset import load_dataset
from bench.errors import UserError
from bench.protocol.file import load
from bench.protocol.protocol import Protocol
from bench.report import figures, render, tables, terminal_text
from bench.report.collect import collect
from bench.report.numbers import numbers
from bench.score import bootstrap
from bench.score.conventions import CONVENTIONS
from bench.score.counts import Counts
from bench.score.iou import old_new_all, score
from bench.store.records import EvaluationInputs
from bench.store.results import Store


@pytest.fixture
def world(in_tmp: Path) -> World:
    return World(Store(in_tmp / "results"))


def texts(store: Store, out: Path, how: str = "default") -> dict[str, str]:
    """A report's files by format."""
    return {
        kind: path.read_text(encoding="utf-8") for kind, path in render.render_all(store, out, how).items()
    }


# ---- formats -----------------------------------------------------------------------------------------------


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
            place = (r.title, quantity, "default")
            mine = [m for m in measured if (m["title"], m["quantity"], m["convention"]) == place]
            last = [m for m in mine if int(m["step"]) == int(m["steps"]) - 1]
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
    found = {
        m["quantity"] + m["class"]: m
        for m in measured
        if (m["method"], m["seed"], m["step"], m["convention"]) == ("mib", "1", "1", "mib")
    }
    assert {what: float(m["value"]) for what, m in found.items()} == pytest.approx(
        {"old": 0, "new": 50, "all": 25, "avg": 62.5, "ioudisc": 0, "ioubox": 50}, abs=1e-4
    )
    assert found["all"]["data"] == "f" * 16 + "-" + "f" * 16
    conditions = [found["all"][name] for name in ("setting", "network", "memory")]
    assert conditions == ["overlapped", "small", "0"]
    assert {m["convention"] for m in measured} == set(CONVENTIONS.known())


def test_best_second_and_the_bound_in_each_format(world: World, tmp_path: Path) -> None:
    world.finish("joint", {1: PERFECT})
    world.finish("mib", GOOD)
    world.finish("ft", BAD)
    text = texts(world.store, tmp_path)
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
        naming = ("src", "href", "data", "action", "srcset", "xlink:href")
        self.targets += [value or "" for name, value in attrs if name in naming]


def test_the_page_needs_nothing_from_outside(several: World, tmp_path: Path) -> None:
    page = render.render_all(several.store, tmp_path)["html"].read_text(encoding="utf-8")
    seen = Outside()
    seen.feed(page)
    loading = "script link img iframe object embed video audio base form"
    assert not seen.tags & set(loading.split())
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
    text = texts(world.store, tmp_path)
    assert "<script" not in text["html"]
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; 50 % of A_1 &amp; B" in text["html"]
    assert render.latex(title) in text["latex"]
    assert render.latex(title) == (
        r"\textless{}script\textgreater{}alert('x')\textless{}/script\textgreater{} 50 \% of A\_1 \& B "
        r"\textbar{} \$2\^{}3\$ \#4 \{\~{}\} \textbackslash{}end *b* `c`"
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


# ---- bootstrap ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", CONVENTIONS.known())
@pytest.mark.parametrize("name", ["shapes", "ade"])
def test_draws_are_what_weighted_counts_would_score(convention: str, name: str) -> None:
    how = CONVENTIONS.find(convention)
    rng = np.random.default_rng(0)
    dataset = load_dataset(name)
    step = Protocol("p", dataset, "overlapped", ((3, 1), (2,), (5,))).step(1)
    rows = (*step.seen, *(c for c in range(1, len(dataset.classes)) if c not in step.seen))
    entries = [(i, r, c) for i in range(6) for r in range(7) for c in range(4) if rng.random() < 0.2]
    shows, amounts = rng.random(6) < 0.7, rng.integers(1, 50, len(entries))
    counts = Counts(tuple("abcdef"), shows, rows, step.n_classes, np.array(entries, np.int32), amounts)
    weights = rng.multinomial(6, np.full(6, 1 / 6), size=40)
    expected = [old_new_all(score(counts, how, dataset, step, w), 3, how)["all"] for w in weights]
    np.testing.assert_allclose(bootstrap.draws(counts, how, dataset, step, weights), expected, rtol=1e-12)


def test_the_interval_of_images_that_are_alike_is_a_point(world: World, tmp_path: Path) -> None:
    world.finish("mib", GOOD)
    page = render.render_all(world.store, tmp_path)["html"].read_text()
    assert "95 % interval over test images: 80.6 to 80.6" in page


def test_a_report_needs_no_file_of_the_data_set_or_the_protocol(world: World, tmp_path: Path) -> None:
    split = 'image = "{name}.jpg"\nmask = "{name}.png"\n'
    classes = 'title = "Mine"\nclasses = ["background", "cup", "bowl"]\n'
    files = [tmp_path / "mine.toml", tmp_path / "mine-1-1.toml"]
    files[0].write_text(f"{classes}[train]\n{split}[test]\n{split}")
    files[1].write_text('dataset = "mine.toml"\nfirst = 1\nthen = 1\n')
    world.finish(["mib", "joint"], GOOD, protocol=load(str(files[1])))
    before = texts(world.store, tmp_path / "before")
    assert (
        before["html"].count("95 % interval over test images: 80.6 to 80.6") == 2 * 2
    )  # in the overview too
    assert "Data: Mine, " in before["html"]
    for path in files:
        path.unlink()
    assert texts(world.store, tmp_path / "after") == before


def test_a_convention_that_came_after_the_test_is_computed_from_its_counts(
    several: World, tmp_path: Path
) -> None:
    expected = texts(several.store, tmp_path / "all", "mib")
    for path in (several.store.root / "jobs").glob("*/metrics.json"):
        content = json.loads(path.read_text())
        del content["scores"]["mib"]
        path.write_text(json.dumps(content))
    found = texts(several.store, tmp_path / "some", "mib")
    for text in (found, expected):
        text["csv"] = "\n".join(sorted(text["csv"].splitlines()))
    assert found == expected


def test_a_convention_whose_package_is_gone_is_left_out(world: World, tmp_path: Path) -> None:
    world.finish("mib", GOOD)
    for path in (world.store.root / "jobs").glob("*/metrics.json"):
        content = json.loads(path.read_text())
        content["scores"]["elsewhere"] = content["scores"]["mib"]
        path.write_text(json.dumps(content))
    assert "elsewhere" not in render.render_all(world.store, tmp_path)["csv"].read_text()


def test_evaluations_change_no_table(world: World, tmp_path: Path) -> None:
    plan = world.finish("mib", GOOD)
    before = render.render_all(world.store, tmp_path)["html"].read_text()
    evaluated = plan.evaluated(EvaluationInputs(split="train"))
    evaluations = evaluated.jobs.keys() - plan.jobs.keys()
    assert evaluations
    for key in evaluations:
        world.publish(evaluated.jobs[key].record(None), BAD[1])
    assert render.render_all(world.store, tmp_path)["html"].read_text() == before


# ---- terminal, command, errors -----------------------------------------------------------------------------


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
    options = f"--results {several.store.root} --out here --protocol tiny --convention ssul"
    arguments = ["report", *options.split()]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    *files, last = done.stdout.splitlines()
    assert files == [f"here/report.{kind}" for kind in ("md", "html", "tex", "csv")]
    assert last == "[] 0"
    assert "convention ssul: " in (tmp_path / "here/report.md").read_text()


def test_nothing_to_report_says_where_and_what_to_run(tmp_path: Path) -> None:
    where = re.escape(f"results folder {tmp_path / 'none'}: nothing finished")
    with pytest.raises(UserError, match=f"{where}.*bench run --protocol"):
        render.render_all(Store(tmp_path / "none"), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ["tinny"]}, "unknown protocol 'tinny'; did you mean 'tiny'"),
        ({"how": "mbi"}, "unknown convention 'mbi'; did you mean 'mib'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(
    world: World, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
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
    [
        ("chain.json", "not there; run bench run for tiny and mib again"),
        ("seed-0/step-1/job.json", "not there; delete "),
    ],
)
def test_missing_files_are_named(world: World, place: str, message: str) -> None:
    world.finish("mib", GOOD)
    path = world.store.root / "tiny/small/mib" / place
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")):
        collect(world.store)
