"""What a seed, a step and an epoch decide: the first weights, the order of images, their crops, dropout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import train

from bench.data.index import class_indexes
from bench.data.loader import EpochSampler
from bench.data.locate import locate
from bench.method import Settings
from bench.method.step_data import StepData
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.store.results import Store
from bench.train.session import Session, open_job

Toy = Callable[..., Path]
Batches = list[list[tuple[int, int]]]


def drawn(path: Path, seed: int, step: int, epoch: int) -> Batches:
    """(position, seed of the crop) of every image of an epoch's batches."""
    protocol = load(path)
    index, files = class_indexes(protocol.dataset), locate(protocol.dataset)
    data = StepData(protocol, protocol.step(step), files, index, Settings(batch_size=4, crop=16), seed)
    with data.loader(data.train, epoch) as loader:
        return [[(int(i), int(s)) for i, s in batch] for batch in loader.sampler]


def test_order_and_crops_follow_from_seed_step_and_epoch(toy: Toy) -> None:
    path = toy(images=48, n_classes=2, first=1)
    base = drawn(path, 0, 0, 0)
    assert drawn(path, 0, 0, 0) == base
    for other in (drawn(path, 1, 0, 0), drawn(path, 0, 0, 1), drawn(path, 0, 1, 0)):
        assert [[i for i, _ in batch] for batch in other] != [[i for i, _ in batch] for batch in base]
        crops, others = ({s for batch in batches for _, s in batch} for batches in (base, other))
        assert not crops & others
    assert len({s for batch in base for _, s in batch}) == sum(map(len, base))


def sampled(**changed: Any) -> Batches:
    about: dict[str, Any] = {
        "n": 12,
        "batch_size": 4,
        "seed": 0,
        "shuffle": True,
        "drop_last": True,
        **changed,
    }
    epoch = about.pop("epoch", 0)
    sampler = EpochSampler(**about)
    sampler.epoch = epoch
    return list(sampler)


def test_a_loaders_order_and_crops_each_follow_from_its_seed_and_epoch() -> None:
    base = sampled()
    for other in (sampled(seed=1), sampled(epoch=1)):
        assert [i for batch in other for i, _ in batch] != [i for batch in base for i, _ in batch]
        crops = [dict(pair for batch in batches for pair in batch) for batches in (base, other)]
        assert all(crops[0][i] != crops[1][i] for i in range(12))
    for batches in (base, sampled(epoch=3)):
        assert sorted(i for batch in batches for i, _ in batch) == list(range(12))


@pytest.fixture
def weights(toy: Toy, quick: list[str]) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """Weights with which a step begins."""
    protocol, store = str(toy(then=2)), Store("r")

    def of(seed: int, step: int) -> dict[str, torch.Tensor]:
        plan = make_plan([protocol], ["ft"], seeds=[seed], overrides=quick)
        for key in plan.chains[0].keys[:step]:
            if not store.done(key):
                train(plan, store, key)
        key = plan.chains[0].keys[step]
        store.make()
        store.open_work(plan.record(key))
        with open_job(store.record(key), store) as session:
            session.begin()
            return {name: t.clone() for name, t in session.method.network.state_dict().items()}

    return of


@pytest.mark.parametrize(("step", "name"), [(0, "body"), (1, "classifier.heads.1.weight")])
def test_the_first_weights_follow_from_the_seed(
    weights: Callable[[int, int], dict[str, torch.Tensor]], step: int, name: str
) -> None:
    one, again, other = weights(0, step), weights(0, step), weights(1, step)
    assert all(torch.equal(one[k], again[k]) for k in one)
    drawn = [k for k, t in one.items() if k.startswith(name) and t.ndim == 4]
    assert drawn
    assert all(not torch.equal(one[k], other[k]) for k in drawn)


def test_what_dropout_draws_from_differs_by_seed_step_and_epoch(toy: Toy, quick: list[str]) -> None:
    protocol = str(toy(then=2))
    found: dict[tuple[int, int], list[float]] = {}
    for seed in (0, 1):
        plan = make_plan([protocol], ["ft"], seeds=[seed], overrides=[*quick, "first_epochs=2", "epochs=2"])
        for step, key in enumerate(plan.chains[0].keys):
            draws: list[float] = []

            def watch(session: Session, draws: list[float] = draws) -> None:
                session.trainer.after_iteration = lambda *_: draws.append(torch.rand(()).item())

            train(plan, Store("r"), key, watch=watch)
            assert len(draws) > 3
            found[seed, step] = draws
    every = [value for draws in found.values() for value in draws]
    assert len(set(every)) == len(every)
