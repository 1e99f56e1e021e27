"""Every setting of every method is in the key of the steps that it decides, and of no other."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from plans import chain_of, every_method
from pydantic import ValidationError

from bench.data.augment import AUGMENTATIONS
from bench.method import Free, Later, Method, Neutral, Settings
from bench.method.registry import MethodSpec, method
from bench.method.settings import FIRST
from bench.models.build import NETWORKS
from bench.plan.plan import Chain, Plan
from bench.protocol.labels import RULES
from bench.testing.plugins import Offers

Toy = Callable[..., Path]


# ---- every setting -----------------------------------------------------------------------------------------


def kinds_of(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation allows, None left out."""
    arguments = typing.get_args(annotation)
    if not arguments or typing.get_origin(annotation) in (typing.Literal, tuple):
        yield annotation
        return
    for part in arguments[:1] if typing.get_origin(annotation) is Annotated else arguments:
        yield from (kind for kind in kinds_of(part) if kind is not type(None))


def candidates(spec: MethodSpec, name: str, value: Any, weights: Path) -> Iterator[Any]:
    """Other values of a setting by its type; the first that the settings allow is taken."""
    named = {
        "network": [n for n in NETWORKS.known() if NETWORKS.find(n).carries(spec.classifier)],
        "label_rule": RULES.known(),
        "augmentation": AUGMENTATIONS.known(),
        "pretrained": [str(weights)],
    }
    plain = name.removeprefix(FIRST)
    for kind in kinds_of(spec.config.model_fields[name].annotation):
        if plain in named:
            yield from named[plain]
        elif typing.get_origin(kind) is typing.Literal:
            yield from typing.get_args(kind)
        elif kind is bool:
            yield not value
        elif kind in (int, float):
            now = kind(value or 0)
            yield from (
                (now + 1, now * 2, now / 2, 0.5, 0.25, 2, 9) if kind is float else (now + 1, now - 1, 9)
            )
        elif typing.get_origin(kind) is tuple:
            yield [*value, 3]


def another(spec: MethodSpec, config: Settings, name: str, weights: Path) -> Any:
    """A value of a setting that is valid and not the one it has."""
    values, now = config.model_dump(), getattr(config, name)
    if name.startswith(FIRST):
        now = getattr(config.at(0), name.removeprefix(FIRST))
    for value in candidates(spec, name, now, weights):
        try:
            found = getattr(spec.config(**{**values, name: value}), name)
        except ValidationError:
            continue
        if found != now:
            return value
    raise AssertionError(
        f"{spec.name}.{name}: no other value than {now!r} was found; teach this test its type"
    )


def mark_of(config: type[Settings], name: str) -> str:
    """ "later", "first", "free" or ""."""
    return next((m.name for m in config.model_fields[name].metadata if hasattr(m, "name")), "")


def plays_a_part(plan: Plan, chain: Chain, spec: MethodSpec, name: str, changed: Settings) -> list[bool]:
    """Whether a setting decides something at each step, as bench.method.settings has it in words."""
    config, plain = chain.recipe.config, name.removeprefix(FIRST)
    mark = mark_of(spec.config, plain)
    replaced = name == plain and getattr(config, FIRST + name, None) is not None
    at_first = mark in ("", "first") and not replaced
    owner = method(plan.jobs[chain.keys[0]].method)
    if name not in owner.config.model_fields:  # another method trains step 0, which may record for this one
        records = spec.cls.records
        at_first = owner.plain != spec.plain and records(config) != records(changed)
    later = mark in ("", "later") and name == plain
    return [at_first, *[later] * (len(chain.keys) - 1)]


@pytest.mark.parametrize("name", every_method())
def test_every_setting_of_every_method_is_in_the_key_where_it_plays_a_part(name: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"some weights")
    spec = method(name)
    plan, chain = chain_of([name])
    wrong = []
    for field in spec.config.model_fields:
        value = another(spec, chain.recipe.config, field, weights)
        other, its = chain_of([name], [f"{name}.{field}={json.dumps(value)}"])
        assert getattr(its.recipe.config, field) != getattr(chain.recipe.config, field), field
        digests = [
            (plan.jobs[a].part.digest, other.jobs[b].part.digest)
            for a, b in zip(chain.keys, its.keys, strict=True)
        ]
        decided = [a != b for a, b in digests]
        expected = plays_a_part(plan, chain, spec, field, its.recipe.config)
        keys = [a != b for a, b in zip(chain.keys, its.keys, strict=True)]
        below = [any(decided[: t + 1]) for t in range(len(decided))]
        if decided != expected or keys != below:
            wrong.append((field, value, "differs at", decided, "should at", expected, "keys", keys))
    assert not wrong


def test_all_sorts_of_settings_are_met() -> None:
    """The test above met settings of each kind, or it proved less than it says."""
    marks = {mark_of(method(n).config, f) for n in every_method() for f in method(n).config.model_fields}
    assert marks == {"", "later", "first", "free"}
    assert len(every_method()) >= 18


class Plain(Method):
    """A method as it is today."""

    class Config(Method.Config):
        """Hyper-parameters."""

        weight: Later[float] = 1.0


class Grown(Method):
    """The same one, later."""

    class Config(Method.Config):
        """Hyper-parameters."""

        weight: Later[float] = 1.0
        shape: Annotated[str, Neutral("round")] = "round"
        first_shape: str | None = None
        sharpness: Annotated[Later[float], Neutral(0.0)] = 0.0
        cache: Free[int] = 0


def test_a_setting_that_comes_later_leaves_old_keys_alone(offer: Offers) -> None:
    offer("mine", Plain)
    before = chain_of(["mine"])[1].keys
    offer("mine", Grown)

    def now(*overrides: str) -> list[bool]:
        return [a != b for a, b in zip(before, chain_of(["mine"], overrides)[1].keys, strict=True)]

    assert now() == [False, False, False]
    assert now("mine.cache=7") == [False, False, False]
    assert now("mine.shape=square") == [True, True, True]
    assert now("mine.shape=round", "mine.sharpness=0") == [False, False, False]
    assert now("mine.sharpness=1") == [False, True, True]
    first = [plan.jobs[chain.keys[t]].part.digest for plan, chain in [chain_of(["mine"])] for t in range(3)]
    plan, chain = chain_of(["mine"], ["mine.first_shape=square"])
    assert [plan.jobs[k].part.digest != d for k, d in zip(chain.keys, first, strict=True)] == [
        True,
        False,
        False,
    ]
