"""One method around another: classes, settings, recipes, notes and names of a composition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import train_all
from plans import plan_of
from torch import Tensor

from bench.errors import UserError
from bench.method import Batch, Later, Method
from bench.method.registry import METHODS, method
from bench.method.resolve import resolve
from bench.plan.make import footnotes_of, make_plan
from bench.protocol.file import load
from bench.store.results import Store
from bench.testing.plugins import Offers
from methods.mib import MiB
from methods.nest import NeST
from methods.ssul_m import SSULM

Toy = Callable[..., Path]


# ---- one method around another -----------------------------------------------------------------------------


class Fusion(Method):
    """A wrapper like weight fusion: each step leaves the mean of the weights before and after it."""

    title = "Fusion"
    wraps = ("linear",)
    needs_teacher = True
    caveats = ("weights of two steps are averaged",)
    version = 4

    class Config(Method.Config):
        """Hyper-parameters."""

        share: Later[float] = 0.5

    called: list[str]

    def start_step(self) -> None:
        self.called = ["fusion"]
        super().start_step()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {**super().losses(batch), "fusion": batch.output.logits.mean() * 0}

    def end_step(self) -> None:
        super().end_step()
        if self.step.index:
            with torch.no_grad():
                for name, old in self.teacher.named_parameters():
                    self.network.get_parameter(name).lerp_(old, self.config.share)

    @classmethod
    def footnotes(cls, config: Any) -> list[str]:
        return [*super().footnotes(config), f"share {config.share}"]


class Second(Method):
    """Another wrapper, which says nothing."""

    title = "Second"
    wraps = ("linear", "conv-heads")

    class Config(Method.Config):
        """Hyper-parameters."""

        margin: float = 1.0


def test_a_wrappers_class_comes_before_the_wrapped_ones() -> None:
    spec = method("nest+mib")
    kinds = spec.cls.mro()
    assert kinds.index(NeST) < kinds.index(MiB) < kinds.index(Method)
    assert issubclass(spec.config, NeST.Config)
    assert issubclass(spec.config, MiB.Config)
    assert set(spec.config.model_fields) == set(NeST.Config.model_fields) | set(MiB.Config.model_fields)
    assert (spec.name, spec.plain, spec.first_step, spec.classifier) == (
        "nest+mib",
        "nest+mib",
        "ft",
        "linear",
    )
    assert spec.title == "MiB + NeST"
    assert spec.base is not None
    assert spec.base.name == "mib"
    assert [recipe.path.name for recipe in spec.recipes] == ["mib.toml", "nest.toml"]
    built = spec.build(spec.config(distillation=3, pretuning_epochs=2))
    assert (built.config.distillation, built.config.pretuning_epochs) == (3, 2)


def test_versions_caveats_and_footnotes_are_those_of_all(offer: Offers) -> None:
    offer("fusion", Fusion)
    offer("second", Second)
    spec = method("fusion+nest+mib")
    assert spec.version == [4, NeST.version, MiB.version]
    assert spec.cls.caveats == (*Fusion.caveats, *MiB.caveats)
    around = method("second+ssul-m")
    assert set(SSULM.caveats) <= set(around.cls.caveats)
    notes = around.cls.footnotes(around.config.model_validate({"memory_size": 7}))
    assert "memory of 7 images" in notes  # a wrapper that says nothing leaves them as they are
    assert notes == SSULM.footnotes(SSULM.Config(memory_size=7))
    protocol = load("voc-15-1")
    recipe = resolve(method("fusion+mib"), protocol, "controlled")
    assert footnotes_of(method("fusion+mib"), recipe, protocol) == [
        "weights of two steps are averaged",
        "share 0.5",
    ]


def test_a_second_wrapper_goes_around_the_first(offer: Offers, toy: Toy) -> None:
    offer("fusion", Fusion, '[on."nest+mib".method]\nshare = 0.25\n')
    spec = method("fusion+nest+mib")
    kinds = spec.cls.mro()
    assert kinds.index(Fusion) < kinds.index(NeST) < kinds.index(MiB)
    assert spec.title == "MiB + NeST + Fusion"
    common = ["epochs=1", "first_epochs=1", "batch_size=4", "crop=32", "pretuning_epochs=1"]
    protocol, weights = str(toy(then=2)), {}
    for name in ("nest+mib", "fusion+nest+mib"):
        plan = make_plan([protocol], [name], overrides=common)
        session = train_all(plan, Store(name))
        weights[name] = {k: v.clone() for k, v in session.method.network.named_parameters()}
        old = dict(session.method.teacher.named_parameters())
    assert session.method.called == ["fusion"]  # type: ignore[attr-defined]
    lines = (Store(name).artifact(list(plan.jobs)[-1]) / "train.jsonl").read_text().splitlines()
    assert '"phase": "pre-tuning"' in lines[0]
    assert all(word in lines[-1] for word in ('"ce"', '"kd"', '"fusion"'))
    for k, before in old.items():  # the same training, then the mean
        expected = weights["nest+mib"][k].lerp(before, 0.25)
        torch.testing.assert_close(weights["fusion+nest+mib"][k], expected)


def test_wildcards_stand_for_what_can_be_wrapped(offer: Offers) -> None:
    offer("fusion", Fusion)
    offer("second", Second)
    alone = METHODS.match(["*"])
    assert {"ft", "mib", "ssul"} <= set(alone)
    assert not {"nest", "fusion", "second"} & set(alone)
    around = METHODS.match(["nest+*"])
    linear = {n for n in alone if method(n).classifier == "linear" and not method(n).cls.at_once}
    assert set(around) == {f"nest+{name}" for name in linear}
    assert set(METHODS.match(["second+*"])) - set(METHODS.match(["fusion+*"])) >= {"second+ssul"}
    assert set(METHODS.match(["fusion+nest+*"])) == {f"fusion+{name}" for name in around}
    assert METHODS.match(["nest+mi*", "ft", "nest+mib"]) == ["nest+mib", "ft"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fusion+nest+fusion+mib", "'fusion' cannot wrap 'nest+fusion+mib'"),
        ("fusion+nest+joint", "'nest' cannot wrap 'joint'"),
        (
            "fusion+second+ssul",
            "'fusion' works on a classifier of kind 'linear', and that of 'second+ssul' is 'conv-heads'",
        ),
        ("fusion+nest", "'nest' wraps another method; write for example nest+ft"),
        ("awt+fusion+nest+mib", "'awt' and 'nest' both initialise the new classifier; take one of them"),
        (
            "fusion+mib+nest",
            "'mib' does not wrap another method; those that do: awt, ewf, fusion, nest, second",
        ),
        ("fusion@wide+mib", "unknown variant 'wide'"),
        ("fusin+mib", "unknown method 'fusin'; did you mean 'fusion'?"),
    ],
)
def test_compositions_that_do_not_hold_are_refused_in_words(offer: Offers, name: str, why: str) -> None:
    offer("fusion", Fusion)
    offer("second", Second)
    with pytest.raises(UserError) as caught:
        method(name)
    assert why in str(caught.value)


def test_settings_of_a_composition_are_in_its_key(offer: Offers) -> None:
    offer("fusion", Fusion)
    changes: tuple[list[str], ...] = ([], ["share=0.1"], ["distillation=1"], ["pretuning_epochs=1"])
    keys = [plan_of(["fusion+nest+mib"], items).chains[0].keys for items in changes]
    assert len({chain[-1] for chain in keys}) == 4
    assert len({chain[0] for chain in keys}) == 1
