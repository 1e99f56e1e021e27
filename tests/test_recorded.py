"""What earlier versions left is found again: results folders of each format, and the keys of every method
(tests/recorded)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import bench.testing.networks
from bench.method.registry import method
from bench.plan.make import make_plan
from bench.report import render_all
from bench.store.records import Environment, JobRecord, Metrics, read_record
from bench.store.results import Store

HERE = Path(__file__).resolve().parent / "recorded"
FORMATS = sorted(path for path in HERE.iterdir() if path.is_dir() and path.name.startswith("format-"))
LIMIT = 200_000
"""Bytes of a recorded folder."""
METHODS = ("joint", "mib", "ewc")
SETTINGS = (f"network={bench.testing.networks.TINY}", "crop=32", "batch_size=4")


@pytest.fixture(params=FORMATS, ids=lambda path: path.name)
def recorded(request: pytest.FixtureRequest, in_tmp: Path) -> Path:
    """A copy of a recorded folder, whose data set is drawn anew."""
    shutil.copytree(request.param, in_tmp / "recorded", symlinks=True)
    return in_tmp / "recorded"


def test_there_is_a_folder_of_this_format_and_it_is_small() -> None:
    assert FORMATS
    for folder in FORMATS:
        files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        assert sum(path.stat().st_size for path in files) < LIMIT


def test_every_job_is_found_again(recorded: Path) -> None:
    plan = make_plan(["shapes-6-2"], METHODS, overrides=SETTINGS, smoke=True)
    store = Store(recorded / "results", smoke=True)
    assert {key: store.state(key).state for key in plan.jobs} == dict.fromkeys(plan.jobs, "done")


def test_a_second_run_does_nothing(recorded: Path) -> None:
    run = bench.run(
        "shapes-6-2", METHODS, set=SETTINGS, smoke=True, cluster="inline", results=recorded / "results"
    )
    assert sorted(run.outcome.already) == sorted(run.plan.jobs)
    assert not run.outcome.done


def test_every_file_is_read_and_the_report_has_its_numbers(recorded: Path) -> None:
    store = Store(recorded / "results", smoke=True)
    links = list(store.links())
    assert {link.method.partition("[")[0] for link in links} == set(METHODS)
    for link in links:
        job = read_record(link.folder / JobRecord.file, JobRecord)
        metrics = read_record(link.folder / Metrics.file, Metrics)
        assert job is not None
        assert metrics is not None
        assert read_record(link.folder / Environment.file, Environment) is not None
        assert job.key == metrics.key == link.folder.resolve().name
        assert [job.protocol.dataset.classes[c] for c in job.protocol.step(job.step).seen] == metrics.classes
    written = render_all(store, recorded / "report", "default")
    final = [link for link in links if link.step == 2 and link.method.startswith("mib")]
    metrics = store.metrics(final[0].folder.resolve().name)
    assert metrics is not None
    value = metrics.scores["default"].all
    assert value is not None
    assert f"{100 * value:.1f}" in written["markdown"].read_text()


def test_keys_of_every_method_stay(recorded: Path) -> None:
    """A setting that comes later has a neutral value; a correction of a recipe that changes what is trained
    does not."""
    before: dict[str, list[str]] = json.loads((recorded / "keys.json").read_text())
    for name, keys in before.items():
        assert method(name)
        (chain,) = make_plan(["shapes-6-2"], [name], "small").chains
        assert list(chain.keys) == keys, name
