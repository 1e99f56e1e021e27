"""On what rows were measured and with which code: what is not alike is not ranked together in silence."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from artifacts import BAD, GOOD, RAN, World

from bench import api, provenance
from bench.report import tables
from bench.store.records import Code, Environment
from bench.store.results import Store


@pytest.fixture
def world(in_tmp: Path) -> World:
    return World(Store(in_tmp / "results"))


def ran(device: str = "cpu", torch: str = "2.6.0+cpu", driver: str | None = None) -> Environment:
    return RAN.model_copy(update={"device": device, "packages": {"torch": torch}, "driver": driver})


def found(table: tables.Table) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Rank of "all", and footnotes, of each row in the order of the table."""
    return {row.title: (row.cells[2].rank, row.notes) for row in table.rows}


def test_rows_of_a_cpu_and_of_a_gpu_are_grouped_and_not_ranked_together(world: World) -> None:
    world.finish("ft", BAD, ran=ran())
    world.finish("ssul", GOOD, ran=ran("cuda", "2.6.0+cu124"))
    world.finish("lwf", GOOD, ran=ran(torch="2.6.0"))  # the build's part is no other version
    note = "measured on a GPU, torch 2.6.0; most rows on a CPU, torch 2.6.0: not ranked with them"
    table = found(world.table())
    assert table == {"FT": ("second", ()), "LwF": ("best", ()), "SSUL": ("", (note,))}
    assert list(table) == ["FT", "LwF", "SSUL"]  # SSUL was asked for before LwF


def test_rows_under_two_versions_of_torch_are_not_ranked_together(world: World) -> None:
    world.finish("ssul", GOOD, ran=ran(torch="2.7.1"))
    world.finish(["ft", "lwf"], BAD, ran=ran())
    note = "measured on a CPU, torch 2.7.1; most rows on a CPU, torch 2.6.0: not ranked with them"
    assert found(world.table()) == {"FT": ("", ()), "LwF": ("", ()), "SSUL": ("", (note,))}


def test_seeds_of_one_row_on_two_devices_are_named(world: World) -> None:
    world.finish("ft", BAD, seeds=[0, 1], ran=ran())
    world.finish("ssul", GOOD, seeds=[0], ran=ran())
    world.finish("ssul", GOOD, seeds=[1], ran=ran("cuda"))
    assert found(world.table())["SSUL"][1] == (
        "measured on a CPU and a GPU, torch 2.6.0; most rows on a CPU, torch 2.6.0: not ranked with them",
    )


def test_joint_on_another_device_is_named_and_has_no_rank_to_lose(world: World) -> None:
    world.finish(["ft", "mib"], GOOD, ran=ran())
    world.finish("joint", GOOD, ran=ran("cuda"))
    assert found(world.table())["Joint"] == (
        "",
        ("measured on a GPU, torch 2.6.0; most rows on a CPU, torch 2.6.0",),
    )


def test_what_is_not_known_is_not_ranked_with_what_is(world: World) -> None:
    world.finish(["ft", "lwf"], BAD, ran=ran())
    world.finish("ssul", GOOD, ran=Environment())
    (note,) = found(world.table())["SSUL"][1]
    assert note.startswith("measured on an unknown device, torch of unknown version; most rows on a CPU")


def test_another_driver_is_a_footnote_alone(world: World) -> None:
    world.finish(["ft", "lwf"], BAD, ran=ran("cuda", driver="550.54"))
    world.finish("ssul", GOOD, ran=ran("cuda", driver="535.104"))
    assert found(world.table())["SSUL"] == ("best", ("GPU driver 535.104, most rows 550.54",))


def test_every_format_tells_the_device_and_the_changed_code(world: World, tmp_path: Path) -> None:
    world.finish(["ft", "lwf"], BAD, ran=ran())
    code = Code(method={"methods/ssul.py": "other"}, engine={**provenance.engine(), "bench/train": "other"})
    mine = ran("cuda", driver="550.54").model_copy(update={"code": code, "gpu": "H100"})
    world.finish("ssul", GOOD, ran=mine)
    written = api.report(world.store.root, tmp_path / "out")
    for kind in ("markdown", "html", "latex"):
        text = written[kind].read_text()
        words = [
            "measured on a GPU, torch 2.6.0; most rows on a CPU, torch 2.6.0: not ranked with them",
            "methods/ssul.py has changed since 2 of its jobs ran: --force, or raise its version",
            "the engine is not quite what 2 of these jobs ran with: bench/train has changed",
        ]
        if kind == "html":  # it has the jobs, too
            words += ["H100, driver 550.54, torch 2.6.0", "abc1234, methods/ssul.py changed since"]
        assert [word for word in words if word not in text] == [], kind
    rows = pd.read_csv(written["csv"]).fillna("").set_index("method")
    mine_in_csv = rows.loc["ssul", ["device", "torch", "driver", "changed"]].drop_duplicates().astype(str)
    assert mine_in_csv.to_numpy().tolist() == [["cuda", "2.6.0", "550.54", "methods/ssul.py"]]
    others = rows.loc[["ft"], ["device", "changed"]].drop_duplicates()
    assert others.to_numpy().tolist() == [["cpu", ""]]


def test_a_job_that_is_in_two_rows_counts_once_for_the_engine(world: World) -> None:
    code = Code(engine={**provenance.engine(), "bench/data": "other"})
    world.finish(["ft", "mib"], GOOD, ran=RAN.model_copy(update={"code": code}))
    says = [line for line in world.table().says if "engine" in line]
    assert says == ["the engine is not quite what 3 of these jobs ran with: bench/data has changed"]
