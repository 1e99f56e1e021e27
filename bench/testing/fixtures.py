"""Fixtures for pytest: `pytest_plugins = ["bench.testing.fixtures"]` in a conftest.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.testing.benchmark import SECONDS_EACH, write_benchmark
from bench.testing.plugins import Offers, offering


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder: caches and results land there."""
    monkeypatch.chdir(tmp_path)
    for variable in ("CISS_BENCH_DATA", "CISS_BENCH_RESULTS", "CISS_BENCH_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def toy(in_tmp: Path) -> Callable[..., Path]:
    """Writes a throw-away benchmark into the folder of `in_tmp`; returns the protocol's file."""
    return partial(write_benchmark, in_tmp)


@pytest.fixture
def quick() -> list[str]:
    """Settings under which a step of the throw-away benchmark takes about a second."""
    return list(SECONDS_EACH)


@pytest.fixture
def offer(in_tmp: Path) -> Iterator[Offers]:
    """Offers methods of the test's own by name: `offer("mine", Mine, recipe="[method]\\nweight = 2")`."""
    with offering(in_tmp) as offers:
        yield offers
