"""Which iterate a step hands on where one is selected: the first best, whatever happens after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import interrupted, train
from predicted import opened
from sklearn.metrics import jaccard_score
from torch import Tensor

from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.protocol.protocol import Protocol
from bench.store.results import Store
from bench.testing.tensors import tensor_dataset
from bench.train.selection import BestOnTest
from bench.train.session import Session
from bench.train.tensors import read_tensors

Toy = Callable[..., Path]
PROTOCOL = Protocol("mixed", tensor_dataset(8), "overlapped", ((5, 2), (7,), (1, 4), (3, 6)))


class Told:
    """Scores that are given, in the place of validations, and the weights that got them.

    Args:
        scores: of each validation.
    """

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores, self.weights, self.modes = list(scores), list[dict[str, Tensor]](), set[bool]()

    def __call__(self, best: BestOnTest) -> float:
        network = best.trainer.method.network
        self.modes.add(network.training)
        network.eval()  # as a test does
        self.weights.append({k: v.clone() for k, v in network.state_dict().items()})
        return self.scores[len(self.weights) - 1]


def told(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> Told:
    scored = Told(scores)
    monkeypatch.setattr(BestOnTest, "validate", lambda best: scored(best))
    return scored


def four_validations(toy: Toy, *more: str) -> tuple[Plan, str]:
    """One step of two epochs of two iterations."""
    settings = ["first_epochs=2", "batch_size=12", "crop=32", "selection=best-on-test", *more]
    plan = make_plan([str(toy(first=4))], ["ft"], overrides=settings)
    (key,) = plan.jobs
    return plan, key


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


SCORES = {
    "the second is the best": ([0.2, 0.7, 0.1, 0.5], 1),
    "it falls": ([0.9, 0.8, 0.7, 0.6], 0),
    "it rises": ([0.1, 0.2, 0.3, 0.4], 3),
    "of equals the first": ([0.1, 0.4, 0.4, 0.4], 1),
    "nothing is ever right": ([0.0, 0.0, 0.0, 0.0], 0),
}


@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("dies", [False, True])
def test_the_first_best_iterate_is_handed_on(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, case: str, dies: bool
) -> None:
    """Also if the job is interrupted between its epochs."""
    monkeypatch.setattr("bench.method.interface.LEAST_INTERVAL", 1)
    (scores, best), store = SCORES[case], Store("r")
    plan, key = four_validations(toy)
    scored = told(monkeypatch, scores)
    if dies:
        with pytest.raises(KeyboardInterrupt):
            train(plan, store, key, watch=interrupted(1))
    session = train(plan, store, key)
    assert len(scored.weights) == 4
    assert not same(scored.weights[0], scored.weights[1])
    assert session.best is not None
    assert session.best.score == scores[best]
    left, _ = read_tensors(store.artifact(key) / "model.safetensors")
    assert same(left, scored.weights[best])
    assert scored.modes == {True}  # training goes on in training mode after a validation


def test_a_step_that_is_never_validated_hands_on_its_last_iterate(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, key = four_validations(toy)
    scored, store = told(monkeypatch, []), Store("r")
    session = train(plan, store, key)
    left, _ = read_tensors(store.artifact(key) / "model.safetensors")
    assert same(left, session.method.network.state_dict())
    assert scored.weights == []


@pytest.mark.parametrize(
    ("total", "validations", "every"), [(1000, 100, 100), (30_000, 100, 300), (5000, 10, 500)]
)
def test_how_often_a_step_is_validated(
    total: int, validations: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, data = opened(PROTOCOL, 1, np.zeros((2, 8, 8), int), np.zeros((2, 8, 8), int), [{7}, {7}], 2)
    at: list[int] = []

    def validate(best: BestOnTest) -> float:
        at.append(0)
        return 0.0

    monkeypatch.setattr(BestOnTest, "validate", validate)
    monkeypatch.setattr(type(trainer.method), "validations", validations)
    best = BestOnTest(trainer, data)
    validated: list[int] = []
    for done in range(1, total + 1):
        best.after_iteration(done, total)
        validated += [done] * (len(at) - len(validated))
    assert validated == list(range(every, total + 1, every))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("rule", ["plop", "ssul", "mib"])
def test_a_validation_is_the_mean_over_the_steps_classes(rule: str, index: int) -> None:
    """On the images that show one of them; background is one of step 0's. By scikit-learn."""
    rng, step = np.random.default_rng(index), PROTOCOL.step(index)
    labels = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 255], (14, 8, 8))
    labels[::3] = rng.choice([0, *step.old, 255], (5, 8, 8))
    predictions = rng.integers(0, step.n_classes, labels.shape)
    shows = [{int(c) for c in np.unique(one)} - {0, 255} for one in labels]
    trainer, data = opened(PROTOCOL, index, labels, predictions, shows, 5, label_rule=rule)
    chosen = np.array([bool(s & set(step.classes)) for s in shows])
    assert not chosen.all()
    assert chosen.any()
    outside = 255 if rule == "mib" else 0  # old and future classes: ignored, or background
    channel = np.full(256, 255)
    channel[:8] = outside
    channel[0] = 0
    channel[list(step.classes)] = range(step.n_classes - len(step.classes), step.n_classes)
    true, predicted = channel[labels[chosen]].ravel(), predictions[chosen].ravel()
    own = list(range(step.n_old, step.n_classes))
    scored = true != 255
    expected = jaccard_score(true[scored], predicted[scored], labels=own, average="macro", zero_division=0)
    assert BestOnTest(trainer, data).validate() == pytest.approx(expected, abs=1e-6)


def test_a_phase_before_the_last_is_no_candidate(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeST's pre-tuning trains another network than the one that is scored."""
    monkeypatch.setattr("bench.method.interface.LEAST_INTERVAL", 1)
    settings = ["first_epochs=1", "epochs=1", "batch_size=6", "crop=32", "nest+mib.pretuning_epochs=1"]
    plan = make_plan([str(toy(then=2))], ["nest+mib"], overrides=[*settings, "selection=best-on-test"])
    store = Store("r")
    first, second = plan.jobs
    told(monkeypatch, [0.0] * 99)
    train(plan, store, first)
    scored = told(monkeypatch, [0.0] * 99)
    lines: list[str] = []

    def watch(session: Session) -> None:
        session.trainer.on_iteration = lambda phase, *_: lines.append(phase.name)

    train(plan, store, second, watch=watch)
    assert len(set(lines)) == 2
    assert len(scored.weights) == lines.count(lines[-1]) < len(lines)
