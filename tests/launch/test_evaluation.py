"""Evaluations are jobs like others: launched, shown and stored alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.launch.choose import make_executor
from bench.launch.display import Display, status_text
from bench.launch.driver import Driver
from bench.launch.status import status_data
from bench.plan.make import make_plan
from bench.store.records import EvaluationInputs
from bench.store.results import Store


@pytest.mark.parametrize("cluster", ["inline", "local"])
def test_an_evaluation_finds_what_its_training_found(
    toy: Callable[..., Path], in_tmp: Path, quick: list[str], cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan([str(toy(then=2))], ["mib"], overrides=quick).evaluated(EvaluationInputs())
    store = Store(in_tmp / "r")
    trained = plan.chains[0].keys[-1]
    (evaluated,) = set(plan.jobs) - set(plan.chains[0].keys)
    with Display(plan, store, live=True) as display:
        driver = Driver(plan, store, make_executor(cluster, store), watch=display.update)
        assert driver.run().ok, [store.state(key).failure for key in driver.outcome.failed]
    assert "seed 0 step 1, test on test  mIoU old" in capsys.readouterr().err
    metrics, found = store.metrics(trained), store.metrics(evaluated)
    assert metrics is not None
    assert found is not None
    assert found.key == evaluated
    assert found.scores == metrics.scores
    counts, wanted = (np.load(store.artifact(key) / "confusion.npz") for key in (evaluated, trained))
    assert set(counts) == set(wanted)
    assert all((counts[name] == wanted[name]).all() for name in wanted)
    assert not (store.artifact(evaluated) / "model.safetensors").exists()
    rows = status_data(store)
    assert [row.state for row in rows] == ["done"] * 3
    assert "step-1 tested on test" in status_text(rows)
