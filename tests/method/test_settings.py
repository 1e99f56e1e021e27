"""Settings: what each step has, what each key holds, and that every `first_` field reaches its reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from jobs import train
from pydantic import Field, ValidationError

from bench.method import First, Free, Later, Length, Method, Neutral, Settings
from bench.method.registry import METHODS, method
from bench.method.settings import FIRST, TRAINING
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.protocol.labels import training_table
from bench.store.results import Store
from bench.testing.plugins import Offers
from bench.train.session import Session, open_job

Toy = Callable[..., Path]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Jobs set the number of threads; it is one again after each test."""
    yield
    torch.set_num_threads(1)


class Everything(Method):
    """Fine-tuning whose step 0 has settings of its own wherever the engine reads one."""

    class Config(Method.Config):
        """Hyper-parameters."""

        first_network: str | None = "deeplab-resnet18"
        first_norm: str | None = None
        first_crop: int | None = 40
        first_augmentation: str | None = "scale-crop"
        first_label_rule: str | None = "mib"
        first_batch_size: int | None = 6
        first_schedule: str | None = "warm-poly"
        first_power: float | None = 0.5
        first_warmup: float | None = 0.5
        first_warmup_rounding: str | None = "none"
        first_min_lr: float | None = 0.001
        first_momentum: float | None = 0.0
        first_weight_decay: float | None = 0.25
        first_precision: str | None = "bf16"
        first_test_precision: str | None = "fp32"
        first_selection: str | None = "best-on-test"
        first_threads: int | None = 2
        weight: float = 1.0
        first_weight: float | None = 3.0

    @classmethod
    def lengths(cls, config: Any, index: int, images: int) -> dict[str, Length]:
        return {"training": Length(config.epochs, images, int(config.weight))}


class Linear(Everything):
    """The same on one network, so that later steps can go on from step 0."""

    class Config(Everything.Config):
        """Hyper-parameters."""

        first_network: str | None = None


def every_config() -> list[Any]:
    """Settings of every method of the registry, and of one that has a `first_` field for all it can."""
    alone = [name for name in METHODS.known() if not METHODS.find(name).cls.wraps]
    names = [*alone, *(f"{name}+plop" for name in METHODS.known() if name not in alone)]
    found = [pytest.param(method(name).config, id=name) for name in names]
    return [*found, pytest.param(Everything.Config, id="everything")]


# ---- folding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", every_config())
def test_at_step_0_every_first_field_stands_in_its_place_and_later_none(kind: type[Settings]) -> None:
    firsts = [name for name in kind.model_fields if name.startswith(FIRST)]
    assert firsts
    for name in firsts:
        plain = name.removeprefix(FIRST)
        usual = getattr(kind(), plain)
        value = {bool: not usual, int: 77, float: 0.77}.get(type(usual), getattr(kind(), name) or usual)
        config = kind(**{name: value})
        assert getattr(config.at(0), plain) == value, name
        assert getattr(config.at(1), plain) == usual, name
        assert getattr(kind(**{name: None}).at(0), plain) == usual, name
        if "free" not in [getattr(mark, "name", "") for mark in kind.model_fields[plain].metadata]:
            assert config.keyed(0)[plain] == value, name
        assert name not in config.keyed(0), name
        assert name not in config.keyed(1), name


def test_most_of_what_the_engine_reads_has_a_first_field_in_these_tests() -> None:
    without = {
        n for n in TRAINING if not n.startswith(FIRST) and f"first_{n}" not in Everything.Config.model_fields
    }
    assert without == {"pretrained", "checkpoint_minutes"}  # step 0 alone reads it; it is the same for all


def test_a_folded_config_is_as_frozen_and_as_strict_as_the_whole() -> None:
    config = Everything.Config().at(0)
    assert type(config) is Everything.Config
    with pytest.raises(ValidationError):
        config.lr = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Everything.Config(first_crop="large")


def test_a_first_field_without_its_own_is_refused_where_it_is_declared() -> None:
    with pytest.raises(TypeError, match=r"test_settings.*Config: first_wait: no field 'wait'"):

        class Config(Settings):
            first_wait: int = 0


# ---- keys --------------------------------------------------------------------------------------------------


class Marked(Settings):
    """One field of each kind."""

    always: int = 1
    later: Later[int] = Field(2, ge=0)
    first: First[int] = 3
    free: Free[int] = 4
    neutral: Annotated[int, Neutral(5)] = 5
    several: tuple[int, ...] = (1, 2)
    first_always: int | None = None
    both: Annotated[Later[int], Neutral(6)] = 6


def own(config: Settings, index: int) -> dict[str, Any]:
    return {name: value for name, value in config.keyed(index).items() if name not in TRAINING}


def test_each_mark_says_which_keys_hold_a_setting() -> None:
    assert own(Marked(), 0) == {"always": 1, "first": 3, "several": [1, 2]}
    assert own(Marked(), 1) == {"always": 1, "later": 2, "several": [1, 2]}
    changed = Marked(first_always=10, later=20, first=30, free=40, neutral=50, both=60)
    assert own(changed, 0) == {"always": 10, "first": 30, "neutral": 50, "several": [1, 2]}
    assert own(changed, 1) == {"always": 1, "later": 20, "neutral": 50, "several": [1, 2], "both": 60}
    assert own(changed, 2) == own(changed, 1)


def test_engine_settings_enter_keys_as_their_marks_say() -> None:
    usual = Settings(pretrained="imagenet")
    assert "pretrained" in usual.keyed(0)
    assert "pretrained" not in usual.keyed(1)
    for index in (0, 1):
        assert "norm" not in usual.keyed(index)
        assert "warmup_rounding" not in usual.keyed(index)
        assert Settings(warmup_rounding="none").keyed(index)["warmup_rounding"] == "none"
        assert usual.keyed(index)["threads"] == 1


# ---- to the reader -----------------------------------------------------------------------------------------


def plan_of(toy: Toy, *more: str) -> Plan:
    common = [
        "network=small",
        "epochs=1",
        "first_epochs=2",
        "batch_size=4",
        "crop=32",
        "lr=0.02",
        "body_lr=0.3",
    ]
    firsts = ["first_lr=0.08", "first_body_lr=0.5", "weight_decay=0.125", "momentum=0.75", "weight=2"]
    return make_plan([str(toy(then=2))], ["mine"], overrides=[*common, *firsts, *more])


def opened(plan: Plan, store: Store, index: int) -> Session:
    key = plan.chains[0].keys[index]
    store.make()
    store.open_work(plan.record(key))
    return open_job(store.record(key), store)


def test_step_0_is_trained_with_its_own_settings_and_later_ones_with_theirs(toy: Toy, offer: Offers) -> None:
    offer("mine", Linear)
    plan, store = plan_of(toy), Store("r")
    expected = {
        0: {"lr": [0.04, 0.08], "decay": 0.25, "momentum": 0.0, "nesterov": False, "batch": 6, "crop": 40},
        1: {"lr": [0.006, 0.02], "decay": 0.125, "momentum": 0.75, "nesterov": True, "batch": 4, "crop": 32},
    }
    for index, wanted in expected.items():
        with opened(plan, store, index) as session:
            (phase,) = session.method.phases()
            optimiser = session.trainer.new_optimiser(phase)
            groups = optimiser.param_groups
            assert [group["lr"] for group in groups] == pytest.approx(wanted["lr"])
            assert {group["weight_decay"] for group in groups} == {wanted["decay"]}
            assert {group["momentum"] for group in groups} == {wanted["momentum"]}
            assert {group["nesterov"] for group in groups} == {wanted["nesterov"]}
            raw = next(iter(session.method.batches(0)))
            assert raw["images"].shape == (wanted["batch"], wanted["crop"], wanted["crop"], 3)
            tested = session.data.test_images()[0, 0]["images"]
            assert tested.shape == (wanted["crop"], wanted["crop"], 3)  # type: ignore[union-attr]
            assert session.data.train.augmentation == ["scale-crop", "random-resized-crop"][index]
            rule = ["mib", "plop"][index]
            table = training_table(session.data.protocol, index, rule)
            assert (session.data.train.table == table).all()
            assert session.method.config.label_rule == rule
            assert session.trainer.precision == ["bf16", "fp32"][index]
            assert torch.get_num_threads() == [2, 1][index]
            assert session.method.selection() == ["best-on-test", "last"][index]
            assert (phase.length.epochs, phase.length.iterations) == ([2, 1][index], [3, 2][index])
            # warm-poly with an exponent of one half and no floor, or poly with 0.9
            rates = [phase.rate(1.0, i, 10) for i in (2, 5, 8)]
            warm = (1e-3 * (1 - 0.4) + 0.4) * 0.8**0.5
            usual = [0.8**0.9, 0.5**0.9, 0.2**0.9]
            assert rates == pytest.approx([[warm, 0.5**0.5, 0.2**0.5], usual][index])
        if not index:
            session = train(plan, store, plan.chains[0].keys[0])
            assert session.best is not None


@pytest.mark.parametrize(
    ("item", "rate"),
    [
        ("first_warmup_rounding=none", (1e-3 * 0.2 + 0.8) * (1 - 2 / 5) ** 0.5),
        ("first_warmup_rounding=down", (1 - 2 / 5) ** 0.5),
    ],
)
def test_the_rounding_of_a_warmup_is_that_of_step_0(toy: Toy, offer: Offers, item: str, rate: float) -> None:
    offer("mine", Linear)
    with opened(plan_of(toy, item), Store("r"), 0) as session:
        (phase,) = session.method.phases()
        assert phase.rate(1.0, 2, 5) == pytest.approx(rate)  # half of five iterations: 2.5, or 2


def test_a_floor_of_step_0_is_not_that_of_later_steps(toy: Toy, offer: Offers) -> None:
    offer("mine", Linear)
    plan, store = plan_of(toy, "first_schedule=poly", "first_selection=last"), Store("r")
    train(plan, store, plan.chains[0].keys[0])
    floors = []
    for index in (0, 1):
        with opened(plan, store, index) as session:
            floors.append(session.method.phases()[0].rate(0.02, 10, 10))
    assert floors == [0.001, 0.0]


def test_a_network_of_step_0_is_the_one_that_is_built(toy: Toy, offer: Offers) -> None:
    offer("mine", Everything)
    with opened(plan_of(toy), Store("r"), 0) as session:
        assert type(session.method.network.body).__name__ == "TorchvisionResNet"


def test_the_plan_counts_step_0_by_its_own_settings(toy: Toy, offer: Offers) -> None:
    offer("mine", type("Counted", (Linear,), {"lengths": Method.__dict__["lengths"]}))
    plan = plan_of(toy)
    first, second = (plan.jobs[key] for key in plan.chains[0].keys)
    assert first.iterations == first.images // 6 * 2
    assert second.iterations == second.images // 4
