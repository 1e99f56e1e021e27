"""SSUL: what its teacher shares with the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import train

from bench.method.interface import Method
from bench.models.build import build_network
from bench.models.network import with_shared_trunk
from bench.plan.make import make_plan
from bench.store.results import Store
from bench.train.session import Session
from bench.train.tensors import read_tensors
from methods.ssul import SSUL

Toy = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def step_1(
    protocol: Path, network: str, quick: list[str], folder: str
) -> tuple[dict[str, torch.Tensor], int, int]:
    """Weights after step 1, passes through a body, iterations."""
    plan = make_plan([str(protocol)], ["ssul"], overrides=[*quick, f"network={network}"])
    store, passes, iterations = Store(folder), [], []
    store.make()

    def watch(session: Session) -> None:
        teacher: Any = session.method.teacher
        for one in (session.method.network, teacher):
            one.body.register_forward_hook(lambda *_: passes.append(1) if session.trainer.optimiser else None)
        session.trainer.after_iteration = lambda *_: iterations.append(1)

    for index, key in enumerate(plan.chains[0].keys[:2]):
        train(plan, store, key, watch=watch if index else lambda _: None)
    weights = read_tensors(store.artifact(plan.chains[0].keys[1]) / "model.safetensors")[0]
    return weights, len(passes), len(iterations)


@pytest.mark.parametrize(
    ("network", "bodies"),
    [("small", 1), ("deeplab-resnet18", 1), ("deeplab-abn-resnet18", 1), ("small-swin", 2)],
)
def test_a_frozen_trunk_sees_a_batch_once_with_the_same_bits(
    toy: Toy, in_tmp: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, network: str, bodies: int
) -> None:
    """A body with stochastic depth is another in training: it sees the batch twice."""
    protocol = toy()
    shared, passes, iterations = step_1(protocol, network, quick, "shared")
    assert passes == bodies * iterations > 0
    monkeypatch.setattr(SSUL, "make_teacher", Method.make_teacher)
    copied, passes, _ = step_1(protocol, network, quick, "copied")
    assert passes == 2 * iterations
    assert shared.keys() == copied.keys()
    assert all(torch.equal(shared[name], copied[name]) for name in shared)


def test_a_shared_trunk_is_no_second_one() -> None:
    network: Any = build_network("deeplab-resnet18", [1, 1, 2], "conv-heads")
    teacher: Any = with_shared_trunk(network.train())
    for part in ("body", "head"):
        pairs = zip(getattr(network, part).parameters(), getattr(teacher, part).parameters(), strict=True)
        assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
    head, old = (one.classifier.heads[-1][-1].weight for one in (network, teacher))
    assert head.data_ptr() != old.data_ptr()
    assert network.training
    assert not any(module.training for module in teacher.modules())
