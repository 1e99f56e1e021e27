from __future__ import annotations

import pytest

from bench.errors import UserError
from bench.protocol import load
from bench.recipe import TRAINING, overrides_for, parse_overrides, resolve
from bench.registry import method, method_names

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
    assert recipe.config.distillation == 100
    assert recipe.sources["distillation"] == "mib.toml [published], protocol voc-15-1"
    assert resolve(method("mib"), load("voc-15-5"), "published").config.distillation == 10
    assert resolve(method("mib@preset"), VOC, "published").config.distillation == 10
    given = resolve(method("mib@preset"), VOC, "published", [("distillation", 7)])
    assert given.config.distillation == 7
    assert given.label == "mib@preset[distillation=7]"
    assert given.sources["distillation"] == "--set"


def test_published_settings_of_the_table() -> None:
    plop = resolve(method("plop"), load("ade-100-5"), "published").config
    assert (plop.pod, plop.pod_logits, plop.epochs, plop.label_rule) == (0.001, 0.00001, 60, "plop")
    short = resolve(method("plop"), load("voc-10-1"), "published").config
    assert (short.first_epochs, short.epochs) == (30, 10)
    assert resolve(method("ewc"), VOC, "published").config.importance == 500
    assert resolve(method("ewc@plop"), VOC, "published").config.importance == 100
    assert resolve(method("rw"), VOC, "published").config.importance == 100
    ssul = resolve(method("ssul"), load("ade-100-50"), "published").config
    assert (ssul.saliency, ssul.lr, ssul.first_lr, ssul.first_body_lr, ssul.schedule, ssul.crop) == ("all", 0.05, 0.01, 0.1, "warm-poly", 513)
    for name in ("ft", "lwf", "lwf-mc", "ilt", "pi", "joint"):
        config = resolve(method(name), VOC, "published").config
        assert (config.epochs, config.first_lr, config.lr, config.batch_size, config.label_rule) == (30, 0.01, 0.001, 24, "mib"), name


@pytest.mark.parametrize("name", every_method())
@pytest.mark.parametrize("track", ["published", "controlled", "small"])
@pytest.mark.parametrize("protocol", ["voc-15-1", "voc-10-1", "ade-100-5"])
def test_every_recipe_resolves(name: str, track: str, protocol: str) -> None:
    recipe = resolve(method(name), load(protocol), track)
    assert set(recipe.sources) == set(type(recipe.config).model_fields)


@pytest.mark.parametrize("name", every_method())
def test_every_hyper_parameter_is_explained(name: str) -> None:
    for key, info in method(name).config.model_fields.items():
        assert info.description, f"{name}.{key} has no docstring"


def test_controlled_and_small_train_every_method_alike() -> None:
    for track in ("controlled", "small"):
        seen = {
            name: {k: getattr(resolve(method(name), VOC, track).config, k) for k in TRAINING - {"network", "pretrained"}}
            for name in ("ft", "lwf", "mib", "plop", "ssul", "ewc")
        }
        assert all(values == seen["ft"] for values in seen.values()), track


def test_step_0_settings_are_folded_in_and_later_ones_left_out() -> None:
    config = resolve(method("ssul"), VOC, "published").config
    first, later = config.at(0), config.at(1)
    assert (first["lr"], first["body_lr"], later["body_lr"]) == (0.01, 0.1, 1.0)
    assert "threshold" not in first
    assert later["threshold"] == 0.7
    assert "pretrained" in first
    assert "pretrained" not in later


def test_a_protocols_values_are_not_those_of_its_class_orders() -> None:
    usual, permuted = (resolve(method("mib"), load(name), "published").config.distillation for name in ("voc-15-1", "voc-15-1-b"))
    assert (usual, permuted) == (100.0, 10.0)


def test_a_variant_has_values_of_its_own_in_a_track() -> None:
    published, small = (resolve(method("nest@swin+mib"), VOC, track).config for track in ("published", "small"))
    assert (published.network, small.network) == ("deeplab-abn-swin-b", "small-swin")
    assert small.pretrained == ""


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("distilation=3", "unknown setting 'distilation'; did you mean 'distillation'"),
        ("mib.distillation=many", "mib.distillation = 'many'"),
        ("mib.distillation=-1", "greater than or equal to 0"),
        ("distillation=3", "a setting of mib alone; write mib.distillation=3"),
        ("plob.pod=3", "unknown method 'plob'; did you mean 'plop'"),
        ("epochs", "write key=value"),
        ("epochs=0", "greater than or equal to 1"),
        ("label_rule=pascal", "label_rule = 'pascal'"),
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


def test_unknown_track() -> None:
    with pytest.raises(UserError, match="did you mean 'published'"):
        resolve(method("mib"), VOC, "publish")
