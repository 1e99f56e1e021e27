"""What tests share: a tiny data set in a temp folder, and the data that CI makes available."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Bench

pytest_plugins = ["bench.testing.fixtures"]
SHARED_VARIABLE = "CISS_BENCH_SHARED"
"""Folder with the real label maps, class indexes and official image lists; .ci/run sets it."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, for tests that hold the project against it."""
    folder = os.environ.get(SHARED_VARIABLE)
    if not folder:
        pytest.skip(f"real data: {SHARED_VARIABLE} is not set")
    return Path(folder)


@pytest.fixture
def command(toy: Callable[..., Path], in_tmp: Path) -> Iterator[Bench]:
    """The command `bench` in a throw-away benchmark."""
    bench = Bench(in_tmp, toy(then=2))
    yield bench
    bench.stop_all()
