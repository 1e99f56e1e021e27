"""What methods hold still, by the weights that their steps leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jobs import train

from bench.plan.make import make_plan
from bench.store.results import Store
from bench.train.session import Session
from bench.train.tensors import read_tensors

Toy = Callable[..., Path]


def moved(toy: Toy, quick: list[str], method: str) -> list[set[str]]:
    """Names of the parameters that each of two steps moved."""
    plan, store = make_plan([str(toy(then=2))], [method], overrides=quick), Store("r")
    found = []
    for key in plan.jobs:
        begun: dict[str, torch.Tensor] = {}

        def watch(session: Session, begun: dict[str, torch.Tensor] = begun) -> None:
            begun |= {name: p.detach().clone() for name, p in session.method.network.named_parameters()}

        train(plan, store, key, watch=watch)
        after, _ = read_tensors(store.artifact(key) / "model.safetensors")
        found.append({name for name, t in begun.items() if not torch.equal(t, after[name])})
    return found


def test_ft_with_a_frozen_body_learns_a_body_once(toy: Toy, quick: list[str]) -> None:
    first, second = moved(toy, quick, "ft-frozen")
    assert any(name.startswith("body.") for name in first)
    assert not any(name.startswith("body.") for name in second)
    for part in ("head.", "classifier.heads.0", "classifier.heads.1"):
        assert any(name.startswith(part) for name in second), part


def test_ft_moves_everything(toy: Toy, quick: list[str]) -> None:
    for names in moved(toy, quick, "ft"):
        assert {"body", "head", "classifier"} <= {name.partition(".")[0] for name in names}
