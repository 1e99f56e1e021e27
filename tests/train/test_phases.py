"""What a phase carries: any of torch's optimisers, clipping, epochs or iterations; all of it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import files, interrupted, train, train_all
from torch import optim

from bench.errors import TrainingError
from bench.method import Length, Method, Phase, scheduled
from bench.method.schedule import Group
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.store.results import Store
from bench.testing.plugins import Offers
from bench.train.session import Session
from bench.train.tensors import read_tensors

Toy = Callable[..., Path]
OPTIMISERS: dict[str, Callable[[list[Group]], optim.Optimizer]] = {
    "sgd": lambda g: optim.SGD(g),
    "sgd with momentum": lambda g: optim.SGD(g, momentum=0.9, dampening=0.1),
    "adamw": lambda g: optim.AdamW(g, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01),
    "adam with amsgrad": lambda g: optim.Adam(g, amsgrad=True),
    "rmsprop": lambda g: optim.RMSprop(g, momentum=0.5, centered=True),
    "adagrad": lambda g: optim.Adagrad(g, lr_decay=0.1),
    "nadam": lambda g: optim.NAdam(g),
    "radam": lambda g: optim.RAdam(g),
    "adamax": lambda g: optim.Adamax(g),
    "adadelta": lambda g: optim.Adadelta(g),
    "asgd": lambda g: optim.ASGD(g, t0=3),
    "rprop": lambda g: optim.Rprop(g),
}


class Optimised(Method):
    """Fine-tuning with an optimiser by name."""

    class Config(Method.Config):
        """Hyper-parameters."""

        which: str = "sgd"

    def optimiser(self, groups: list[Group]) -> optim.Optimizer:
        return OPTIMISERS[self.config.which](groups)


def one_step(toy: Toy, name: str, *more: str, images: int = 24) -> Plan:
    """A plan of one step of three epochs of six iterations."""
    common = ["first_epochs=3", "batch_size=4", "crop=32", "first_lr=0.002"]
    return make_plan([str(toy(first=4, images=images))], [name], overrides=[*common, *more])


def logged(store: Store, key: str) -> list[dict[str, Any]]:
    text = (store.artifact(key) / "train.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("which", OPTIMISERS)
def test_an_optimisers_state_is_restored_whole(toy: Toy, offer: Offers, which: str) -> None:
    offer("optimised", Optimised)
    plan = one_step(toy, "optimised", f'which="{which}"')
    whole, broken = Store("whole"), Store("broken")
    (key,) = plan.jobs
    train(plan, whole, key)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(plan, broken, key, watch=interrupted(1))
    kept = {name.split(".")[-1] for name in read_tensors(broken.work(key) / "checkpoint.safetensors")[0]}
    wanted = {"adamw": {"exp_avg", "exp_avg_sq", "step"}, "adam with amsgrad": {"max_exp_avg_sq"}}
    assert kept >= wanted.get(which, set())
    train(plan, broken, key)
    assert files(whole, plan) == files(broken, plan)


def test_optimisers_differ_or_the_test_above_says_nothing(toy: Toy, offer: Offers) -> None:
    offer("optimised", Optimised)
    protocol, weights = str(toy(first=4)), set()
    for which in OPTIMISERS:
        common = ["first_epochs=1", "batch_size=4", "crop=32", "first_lr=0.002"]
        plan = make_plan([protocol], ["optimised"], overrides=[*common, f'which="{which}"'])
        train_all(plan, Store("r"))
        weights |= set(files(Store("r"), plan, ["model.safetensors"]).values())
    assert len(weights) == len(OPTIMISERS)


class Clipped(Method):
    """Fine-tuning whose gradients are clipped, all together, in two groups."""

    class Config(Method.Config):
        """Hyper-parameters."""

        clip: float | None = None

    norms: list[float]

    def optimiser(self, groups: list[Group]) -> optim.Optimizer:
        built, self.norms = super().optimiser(groups), []

        def watch(optimiser: optim.Optimizer, *_: Any) -> None:
            found = [p.grad.norm() for group in optimiser.param_groups for p in group["params"]]
            self.norms.append(float(torch.stack(found).norm()))

        built.register_step_pre_hook(watch)
        return built

    def phases(self) -> list[Phase]:
        (phase,) = super().phases()
        phase.clip = self.config.clip
        return [phase]


def test_gradients_are_clipped_over_all_parameters_together(toy: Toy, offer: Offers) -> None:
    offer("clipped", Clipped)
    protocol, norms = str(toy(first=4)), {}
    for clip in (None, 0.05):
        common = ["first_epochs=1", "batch_size=4", "crop=32", *([f"clip={clip}"] if clip else [])]
        plan = make_plan([protocol], ["clipped"], overrides=common)
        session = train_all(plan, Store("r"))
        norms[clip] = session.method.norms  # type: ignore[attr-defined]
    assert min(norms[None]) > 0.05
    assert norms[0.05] == pytest.approx([0.05] * len(norms[0.05]), rel=1e-3)


class Iterated(Method):
    """A short phase in epochs, then one of so many iterations, then another in epochs."""

    class Config(Method.Config):
        """Hyper-parameters."""

        iterations: int = 8
        around: bool = True

    @classmethod
    def lengths(cls, config: Any, index: int, images: int) -> dict[str, Length]:
        counted = {"counted": Length(1, images, config.iterations)}
        around = Length(config.epochs, images)
        return {"before": around, **counted, "after": around} if config.around else counted

    def phases(self) -> list[Phase]:
        rate = scheduled(self.config)
        return [
            Phase(name, self.length(name), self.parameter_groups(), self.losses, rate, self.optimiser)
            for name in self.lengths(self.config, self.step.index, len(self.data.train))
        ]


@pytest.mark.parametrize("iterations", [2, 6, 8, 13])
def test_a_phase_of_iterations_has_so_many_whatever_the_images(
    toy: Toy, offer: Offers, iterations: int
) -> None:
    offer("iterated", Iterated)
    plan = one_step(toy, "iterated", f"iterations={iterations}", "around=false")
    store = Store("r")
    (key,) = plan.jobs
    train(plan, store, key)
    lines = logged(store, key)
    assert [line["iteration"] for line in lines] == list(range(iterations))
    assert [line["epoch"] for line in lines] == [i // 6 for i in range(iterations)]
    assert plan.jobs[key].iterations == iterations
    rates = [0.002 * (1 - i / iterations) ** 0.9 for i in range(iterations)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 6])
def test_phases_of_iterations_go_on_where_they_were_interrupted(
    toy: Toy, offer: Offers, epochs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One epoch, two begun ones of eight iterations, one epoch; a memory of what was before would show."""
    offer("iterated", Iterated)
    plan = one_step(toy, "iterated", "first_epochs=2")
    whole, broken = Store("whole"), Store("broken")
    (key,) = plan.jobs
    train(plan, whole, key)
    assert [line["phase"] for line in logged(whole, key)].count("counted") == 8
    assert plan.jobs[key].iterations == len(logged(whole, key)) == 12 + 8 + 12
    with pytest.raises(KeyboardInterrupt):
        train(plan, broken, key, watch=interrupted(epochs))
    train(plan, broken, key)
    phase, done = [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)][epochs - 1]
    assert f"resuming {key}: phase {phase}, {done} epochs done" in capsys.readouterr().out
    assert files(whole, plan) == files(broken, plan)


def test_a_smoke_run_cuts_a_phase_of_iterations_short(toy: Toy, offer: Offers) -> None:
    offer("iterated", Iterated)
    protocol = str(toy(first=4))
    plan = make_plan([protocol], ["iterated"], overrides=["batch_size=4", "crop=32"], smoke=True)
    store = Store("r", smoke=True)
    (key,) = plan.jobs
    train(plan, store, key)
    assert [line["phase"] for line in logged(store, key)] == ["before"] * 2 + ["counted"] * 2 + ["after"] * 2


def test_an_epoch_without_a_batch_is_an_error_of_iterations_too(toy: Toy, offer: Offers) -> None:
    offer("iterated", Iterated)
    plan = one_step(toy, "iterated", "around=false")

    def emptied(session: Session) -> None:
        session.method.batches = lambda epoch: []  # type: ignore[method-assign]

    with pytest.raises(TrainingError, match="an epoch without a batch"):
        train(plan, Store("r"), next(iter(plan.jobs)), watch=emptied)
