"""A step's memory: whose images are candidates, which classes take turns, and how its images come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jobs import train
from torch import nn

from bench.data.index import class_indexes
from bench.data.locate import locate
from bench.method import replay
from bench.method.batch import Batch
from bench.method.replay import Record
from bench.method.settings import Settings
from bench.method.step_data import StepData
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.protocol.protocol import Step
from bench.store.results import Store
from bench.train.session import Session
from methods import eir

Toy = Callable[..., Path]


def data_of(path: Path, index: int, seed: int = 0) -> StepData:
    """Data of a step."""
    p, config = load(path), Settings(crop=24, batch_size=4, label_rule="ssul")
    data = StepData(p, p.step(index), locate(p.dataset), class_indexes(p.dataset), config, seed)
    data.prepare = lambda raw: Batch(raw["images"], raw["labels"].long(), nn.Identity(), None, raw)
    return data


def memory(path: Path, seed: int = 0, size: int = 8, last: list[Record] | None = None) -> list[Record]:
    """The memory of step 2. Which class an image shows is known by its name: image i shows i % 4 + 1."""
    data = data_of(path, 2, seed)
    names = data.names(1)

    def classes(batch: Batch) -> list[list[int]]:
        return [[int(names[i][-3:]) % 4 + 1] for i in batch.extra["index"].tolist()]

    state = {replay.STATE: [list(record) for record in last or []]}
    return replay.draw_memory(data, state, classes, size, augmentation="center-crop")


def test_candidates_are_the_last_memory_and_the_previous_steps_images(toy: Toy) -> None:
    path = toy(images=48, first=2, then=1)
    data = data_of(path, 2)
    before, now = set(data.names(1)), set(data.names(2))
    assert before - now
    assert now - before
    drawn = memory(path)
    assert {record.name for record in drawn} <= before
    last = [Record("kept0", (1,), 1), Record("kept1", (2,), 2)]
    with_last = memory(path, last=last)
    assert {"kept0", "kept1"} <= {record.name for record in with_last}


def test_only_classes_of_earlier_steps_take_turns(toy: Toy) -> None:
    """Channels 1 to 3 were learned before step 2; 4 is learned now."""
    last = [Record(f"new{i}", (4,), 4) for i in range(8)]
    drawn = memory(toy(images=48, first=2, then=1), last=last)
    assert drawn
    assert {record.drawn_for for record in drawn} <= {1, 2, 3}


def test_each_seed_draws_its_own_memory(toy: Toy) -> None:
    path = toy(images=96, first=2, then=1)
    drawn = [[record.name for record in memory(path, seed, 4)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_ssul_m_labels_memory_with_every_class_so_far(
    toy: Toy, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's own images show its class and background alone."""
    plan = make_plan([str(toy(images=48))], ["ssul-m"], overrides=[*quick, "ssul-m.memory_size=8"])
    store = Store("r")
    shown: dict[bool, set[int]] = {True: set(), False: set()}

    def watch(session: Session) -> None:
        plain = session.trainer.batch

        def batch(raw: Mapping[str, Any]) -> Batch:
            for labels, replayed in zip(raw["labels"], raw.get("replayed", []), strict=False):
                shown[bool(replayed)] |= set(np.unique(labels.numpy()).tolist()) - {0, 255}
            return plain(raw)

        monkeypatch.setattr(session.trainer, "batch", batch)

    keys = list(plan.jobs)
    for key in keys:
        train(plan, store, key, watch=watch if key == keys[-1] else lambda _: None)
    step = plan.chains[0].protocol.step(len(keys) - 1)
    new = set(range(step.n_old, step.n_classes))
    assert shown[False] <= new
    assert shown[True] - new


def test_eir_takes_no_image_on_which_a_class_is_torn() -> None:
    whole = torch.tensor([[1, 1, 0, 2], [0, 1, 0, 2], [255, 0, 0, 255]])
    torn = torch.tensor([[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 0, 0]])  # corners that touch do not join
    assert eir.single_instances(torch.stack([whole, torn])) == [[1, 2], None]


def test_the_region_of_eir_is_where_new_classes_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor | None] = []

    def distance(new: Any, old: Any, region: torch.Tensor | None, index: str) -> torch.Tensor:
        seen.append(region)
        return torch.zeros(())

    monkeypatch.setattr(eir, "region_distillation", distance)
    labels = torch.tensor([[[0, 1, 2, 255]]])

    class Network(nn.Module):
        def __init__(self, n_classes: int) -> None:
            super().__init__()
            self.n_classes = n_classes

        def forward(self, images: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(1, self.n_classes, 1, 4))

    for region in ("new", "all"):
        built = eir.EIR(eir.EIR.Config(region=region))
        built.step = Step(1, (2,), (1,))
        batch = Batch(torch.zeros(1, 3, 1, 4), labels, Network(3), Network(2))
        built.losses(batch)
    assert seen[0] is not None
    assert seen[0].tolist() == [[[False, False, True, False]]]
    assert seen[1] is None
