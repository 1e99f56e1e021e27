"""Mixed precision: of training, and of tests where the authors' codes test in full precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import train
from torch import Tensor

from bench.method.interface import Method
from bench.plan.make import make_plan
from bench.store.results import Store
from bench.testing.plugins import Offers

Toy = Callable[..., Path]


class Noting(Method):
    """Fine-tuning that notes in which precision it is asked."""

    asked: tuple[list[bool], list[bool]] = ([], [])

    def losses(self, batch: Any) -> dict[str, Tensor]:
        self.asked[0].append(torch.is_autocast_enabled("cpu"))
        return super().losses(batch)

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        self.asked[1].append(torch.is_autocast_enabled("cpu"))
        return super().predict(output, size)


@pytest.mark.parametrize(("test_precision", "mixed"), [("as-training", True), ("fp32", False)])
def test_a_test_is_in_the_precision_asked_for(
    toy: Toy, in_tmp: Path, quick: list[str], offer: Offers, test_precision: str, mixed: bool
) -> None:
    Noting.asked = ([], [])
    offer("noting", Noting)
    sets = [*quick, "precision=bf16", f"test_precision={test_precision}"]
    plan = make_plan([str(toy())], ["noting"], overrides=sets)
    train(plan, Store("results"), next(iter(plan.jobs)))
    trained, tested = Noting.asked
    assert set(trained) == {True}
    assert set(tested) == {mixed}


@pytest.mark.parametrize(
    ("test_precision", "dtype"), [("as-training", torch.bfloat16), ("fp32", torch.float32)]
)
def test_a_memory_is_looked_for_in_the_precision_asked_for(
    toy: Toy,
    in_tmp: Path,
    quick: list[str],
    monkeypatch: pytest.MonkeyPatch,
    test_precision: str,
    dtype: torch.dtype,
) -> None:
    from methods.ssul_m import SSULM

    seen: set[torch.dtype] = set()
    classes = SSULM.classes_of_candidates

    def watched(self: SSULM, batch: Any) -> Any:
        seen.add(batch.teacher.small_logits.dtype)
        return classes(self, batch)

    monkeypatch.setattr(SSULM, "classes_of_candidates", watched)
    sets = [*quick, "precision=bf16", f"test_precision={test_precision}", "ssul-m.memory_size=4"]
    plan = make_plan([str(toy(then=2))], ["ssul-m"], overrides=sets)
    for key in plan.jobs:
        train(plan, Store("results"), key)
    assert seen == {dtype}
