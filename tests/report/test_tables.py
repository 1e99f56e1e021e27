"""Tables: from artifacts with known counts to numbers, marks and words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from artifacts import BAD, FIRST, GOOD, LAST, PERFECT, TINY, World, row

from bench.data.dataset import load_dataset
from bench.protocol.protocol import Protocol
from bench.report import notes as footnotes
from bench.report import render, tables
from bench.report.collect import collect
from bench.report.numbers import numbers
from bench.store.results import Store


@pytest.fixture
def world(in_tmp: Path) -> World:
    return World(Store(in_tmp / "results"))


def ranks(table: tables.Table) -> dict[str, list[str]]:
    return {r.title: [cell.rank for cell in r.cells[:4]] for r in table.rows}


def notes(table: tables.Table, title: str) -> tuple[str, ...]:
    (found,) = [r for r in table.rows if r.title == title]
    return found.notes


# ---- numbers -----------------------------------------------------------------------------------------------


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
    assert (
        world.table("mbs").columns[1] == "old (1)"
    )  # MBS ignores unlabelled pixels, though its convention averages background
    assert world.table("default").columns[1] == "old (0-1)"


def test_a_class_at_zero_counts_in_mbs_old_and_new_but_not_in_all(world: World) -> None:
    world.finish("mib", BAD)
    table = world.table("mbs")
    assert table.columns[1:4] == ("old (0-1)", "new (2)", "all (0-2)")
    assert row(table, "MiB") == {"old": "0.0", "new": "50.0", "all": "52.3", "avg": "76.1", "n": "1"}
    section = world.section()
    classes = tables.per_class(section, numbers([section]), "mbs")
    assert [r.cells[1].text for r in classes.rows] == ["54.5", "0.0", "50.0"]


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


# ---- what is not finished, or not alike --------------------------------------------------------------------


def test_an_unfinished_seed_is_named_and_not_averaged(world: World) -> None:
    world.finish("mib", GOOD, seeds=[0])
    world.finish("mib", BAD, seeds=[1], steps=1)
    world.finish("mib", BAD, seeds=[2], steps=0)
    assert row(world.table(), "MiB")["all"] == "80.6"
    assert row(world.table(), "MiB")["n"] == "1"
    assert notes(world.table(), "MiB") == (
        "not finished: seed 1 (1 of 2 steps, all 70.8 after step 0), seed 2 (0 of 2 steps)",
    )


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
    assert [(s.groups, [c.title for c in s.chains]) for s in sections] == [
        (((1,), (2,)), ["MiB"]),
        (((2,), (1,)), ["FT"]),
    ]
    assert [s.name.partition("~")[:2] for s in sections] == [
        ("tiny", ""),
        ("tiny", "~"),
    ]  # so that links and CSV rows tell them apart


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
    assert notes(world.table(), "MiB") == (footnotes.SMOKE,)


# ---- titles, order, footnotes ------------------------------------------------------------------------------


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
