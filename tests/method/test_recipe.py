from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from plans import config_of

from bench.errors import UserError
from bench.method import Later, Method
from bench.method.registry import method, method_names
from bench.method.resolve import overrides_for, parse_overrides, resolve
from bench.method.settings import TRAINING
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.testing.plugins import Offers

Toy = Callable[..., Path]
VOC = load("voc-15-1")


def every_method() -> list[str]:
    names = []
    for name in method_names():
        try:
            method(name)
            names.append(name)
        except UserError:  # one that wraps another
            names += [f"{name}+ft", f"{name}+plop"]
    return names


def test_the_last_layer_wins_and_says_so() -> None:
    recipe = resolve(method("mib"), VOC, "published")
    assert config_of("mib", "voc-15-1").distillation == 100
    assert recipe.sources["distillation"] == "mib.toml [published], protocol voc-15-1"
    assert config_of("mib", "voc-15-5").distillation == 10
    assert config_of("mib@preset", "voc-15-1").distillation == 10
    given = resolve(method("mib@preset"), VOC, "published", [("distillation", 7)])
    assert given.config.model_dump()["distillation"] == 7
    assert given.label == "mib@preset[distillation=7]"
    assert given.sources["distillation"] == "--set"


def test_published_settings_of_the_table() -> None:
    plop = config_of("plop", "ade-100-5")
    assert (plop.pod, plop.pod_logits, plop.epochs, plop.label_rule) == (0.001, 0.00001, 60, "plop")
    short = config_of("plop", "voc-10-1")
    assert (short.first_epochs, short.epochs) == (30, 10)
    assert config_of("ewc", "voc-15-1").importance == 500
    assert config_of("ewc@plop", "voc-15-1").importance == 100
    assert config_of("rw", "voc-15-1").importance == 100
    ssul = config_of("ssul", "ade-100-50")
    assert (ssul.saliency, ssul.lr, ssul.first_lr, ssul.first_body_lr, ssul.schedule, ssul.crop) == (
        "all",
        0.05,
        0.01,
        0.1,
        "warm-poly",
        513,
    )
    for name in ("ft", "lwf", "lwf-mc", "ilt", "pi", "joint"):
        config = config_of(name, "voc-15-1")
        assert (config.epochs, config.first_lr, config.lr, config.batch_size, config.label_rule) == (
            30,
            0.01,
            0.001,
            24,
            "mib",
        ), name


@pytest.mark.parametrize("name", every_method())
@pytest.mark.parametrize("track", ["published", "controlled", "small"])
@pytest.mark.parametrize("protocol", ["voc-15-1", "voc-10-1", "ade-100-5"])
def test_every_recipe_resolves(name: str, track: str, protocol: str) -> None:
    recipe = resolve(method(name), load(protocol), track)
    fields = type(recipe.config).model_fields
    told = {key for key, info in fields.items() if getattr(recipe.config, key) != info.default}
    assert told
    assert {key for key in told if recipe.sources[key] == "default"} == set()


@pytest.mark.parametrize("name", every_method())
def test_every_hyper_parameter_is_explained(name: str) -> None:
    for key, info in method(name).config.model_fields.items():
        assert info.description, f"{name}.{key} has no docstring"


def test_controlled_and_small_train_every_method_alike() -> None:
    for track in ("controlled", "small"):
        seen = {
            name: {
                k: getattr(resolve(method(name), VOC, track).config, k)
                for k in TRAINING - {"network", "pretrained"}
            }
            for name in ("ft", "lwf", "mib", "plop", "ssul", "ewc")
        }
        assert all(values == seen["ft"] for values in seen.values()), track


def test_step_0_settings_are_folded_in_and_later_ones_left_out_of_its_key() -> None:
    config = config_of("ssul", "voc-15-1")
    first, later = config.at(0), config.at(1)
    assert (first.lr, first.body_lr, later.body_lr) == (0.01, 0.1, 1.0)
    assert (first.keyed(0), later.keyed(1)) == (config.keyed(0), config.keyed(1))
    assert (config.keyed(0)["body_lr"], config.keyed(1)["body_lr"]) == (0.1, 1.0)
    assert "threshold" not in config.keyed(0)
    assert config.keyed(1)["threshold"] == 0.7
    assert "pretrained" in config.keyed(0)
    assert "pretrained" not in config.keyed(1)


def test_a_protocols_values_are_not_those_of_its_class_orders() -> None:
    usual, permuted = (config_of("mib", name).distillation for name in ("voc-15-1", "voc-15-1-b"))
    assert (usual, permuted) == (100.0, 10.0)


def test_a_variant_has_values_of_its_own_in_a_track() -> None:
    published, small = (
        resolve(method("nest@swin+mib"), VOC, track).config for track in ("published", "small")
    )
    assert (published.network, small.network) == ("deeplab-abn-swin-b", "small-swin")
    assert small.pretrained == ""


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("distilation=3", "unknown setting 'distilation'; did you mean 'distillation'"),
        ("mib.distillation=many", "--set: mib: distillation = 'many': Input should be a valid number"),
        ("mib.distillation=-1", "greater than or equal to 0"),
        ("distillation=3", "a setting of mib alone; write mib.distillation=3"),
        ("plob.pod=3", "unknown method 'plob'; did you mean 'plop'"),
        ("epochs", "write key=value"),
        ("epochs=0", "greater than or equal to 1"),
        ("label_rule=pascal", "--set: mib.label_rule: unknown label rule 'pascal' (known: "),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(item: str, words: str) -> None:
    specs = [method("mib"), method("plop")]
    with pytest.raises(UserError) as caught:
        [resolve(spec, VOC, "small", overrides_for(spec, parse_overrides([item]), specs)) for spec in specs]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_published_recipe_for_a_data_set() -> None:
    with pytest.raises(UserError, match="no published recipe for data set 'shapes'; use --track small"):
        resolve(method("mib"), load("shapes-6-2"), "published")


# ---- files -------------------------------------------------------------------------------------------------


class Mine(Method):
    """A method whose recipe these tests write."""

    class Config(Method.Config):
        """Hyper-parameters."""

        weight: Later[float] = 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[metod]\nweight = 2", "mine.toml: unknown table 'metod'; did you mean 'method'?"),
        ("[smal]\nlr = 2", "mine.toml: unknown table 'smal'; did you mean 'small'?"),
        ("[smal.voc]\nlr = 2", "mine.toml: unknown table 'smal'; did you mean 'small'?"),
        ("[on.mib.smal]\nlr = 2", "mine.toml: [on.mib]: unknown table 'smal'; did you mean 'small'?"),
        ("[on.mib]\nlr = 2", "mine.toml: [on.mib]: unknown table 'lr'"),
        ("[on]\nmib = 2", "mine.toml: [on]: mib = 2: not a table"),
        (
            "[published.vco]\nlr = 2",
            "mine.toml: [published]: unknown data set or protocol 'vco'; did you mean 'voc'?",
        ),
        (
            "[method.shape]\nlr = 2",
            "mine.toml: [method]: unknown data set or protocol 'shape'; did you mean 'shapes'?",
        ),
        ("[small.vco-15-1]\nlr = 2", "unknown data set or protocol 'vco-15-1'; did you mean 'voc-15-1"),
        ("[variant.wide.vco]\nlr = 2", "mine.toml: [variant.wide]: unknown data set or protocol 'vco'"),
        (
            "[variant.wide.smal]\nlr = 2",
            "mine.toml: [variant.wide]: unknown table 'smal'; did you mean 'small'?",
        ),
        ("[method]\nwieght = 2", "mine.toml [method]: unknown setting 'wieght'; did you mean 'weight'?"),
        (
            "[published.voc]\nwieght = 2",
            "mine.toml [published], voc: unknown setting 'wieght'; did you mean 'weight'?",
        ),
        (
            "[variant.wide]\nwieght = 2",
            "mine.toml [variant.wide]: unknown setting 'wieght'; did you mean 'weight'?",
        ),
        ("[variant.wide.small]\nwieght = 2", "mine.toml [variant.wide.small]: unknown setting 'wieght'"),
        ("[controlled.ade]\nwieght = 2", "mine.toml [controlled], ade: unknown setting 'wieght'"),
        ("weight = 2", "mine.toml: weight = 2: a value outside of a table; write it under [method]"),
        ("variant = 2", "mine.toml: variant = 2: a value outside of a table"),
        ("[small.voc.deeper]\nlr = 2", "mine.toml: [small.voc.deeper]: a table too deep"),
        ("[variant.wide.small.voc.deeper]\nlr = 2", "[variant.wide.small.voc.deeper]: a table too deep"),
        ("[small]\nlike = 2", "mine.toml: small.like = 2: not the name of a method"),
        ("[small", "mine.toml: not a TOML file in UTF-8"),
    ],
)
def test_a_recipe_that_nothing_reads_is_refused_in_one_line(offer: Offers, text: str, words: str) -> None:
    def asked() -> None:
        offer("mine", Mine, text)
        method("mine")

    with pytest.raises(UserError) as caught:
        asked()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_slip_is_refused_also_where_this_run_does_not_read(offer: Offers) -> None:
    offer("mine", Mine, "[published.ade]\nwieght = 2")
    with pytest.raises(UserError, match=r"mine\.toml \[published\], ade: unknown setting 'wieght'"):
        make_plan(["shapes-6-2"], ["mine"], "small")


def test_tables_of_data_sets_and_protocols_of_ones_own_are_read(offer: Offers, toy: Toy) -> None:
    recipe = "[small]\nweight = 2\n[small.toy-set]\nweight = 3\n[small.toy-2-1]\nlr = 0.5\n"
    recipe += "".join(
        f"[small.{name}]\nweight = 9\n" for name in ("cityscapes", "voc2012", "ade20k", "coco-40-40")
    )
    offer("mine", Mine, recipe)
    protocol = load(toy())
    found = resolve(method("mine"), protocol, "small")
    assert (found.config.weight, found.config.lr) == (3, 0.5)  # type: ignore[attr-defined]
    assert found.sources["weight"] == "mine.toml [small], data set toy-set"
    assert found.sources["lr"] == "mine.toml [small], protocol toy-2-1"
    assert config_of("mine", "voc-15-1", "small").weight == 2


def test_what_a_value_may_not_be_is_said_with_its_place(offer: Offers) -> None:
    offer("mine", Mine, '[small]\nweight = "heavy"\n[small.ade]\nlr = true')
    with pytest.raises(
        UserError, match=r"mine\.toml \[small\]: mine: weight = 'heavy': Input should be a valid number"
    ):
        resolve(method("mine"), VOC, "small")
    with pytest.raises(
        UserError, match=r"mine\.toml \[small\], data set ade: mine: lr = True: true is not a number"
    ):
        resolve(method("mine"), load("ade-100-10"), "small", [("weight", 1)])


class Around(Method):
    """A wrapper whose recipe these tests write."""

    wraps = ("linear",)

    class Config(Method.Config):
        """Hyper-parameters."""

        radius: Later[float] = 1.0


def test_what_a_wrapper_says_around_one_method_is_checked_with_that_one(offer: Offers) -> None:
    offer(
        "around", Around, "[method]\nradius = 2\n[on.mib.method]\ndistillation = 3\n[on.plop.small]\npod = 7"
    )
    assert config_of("around+mib", "voc-15-1", "small").distillation == 3
    assert config_of("around+plop", "voc-15-1", "small").pod == 7
    offer("around", Around, "[on.mib.small]\npod = 7")
    with pytest.raises(UserError, match=r"around\.toml \[on\.mib\.small\]: unknown setting 'pod'"):
        resolve(method("around+mib"), VOC, "published")
    assert method("around+plop").name == "around+plop"


def test_training_settings_of_another_recipe_come_first(offer: Offers) -> None:
    offer("mine", Mine, '[published]\nlike = "plop"\n[published.voc]\nepochs = 3')
    found = resolve(method("mine"), VOC, "published")
    assert found.config.epochs == 3
    assert found.config.label_rule == "plop"
    offer("mine", Mine, '[published]\nlike = "nobody"')
    with pytest.raises(
        UserError, match=r"mine\.toml: \[published\] like = 'nobody': there is no nobody\.toml"
    ):
        resolve(method("mine"), VOC, "published")


def test_unknown_track() -> None:
    with pytest.raises(UserError, match="did you mean 'published'"):
        resolve(method("mib"), VOC, "publish")
