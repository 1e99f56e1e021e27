"""NeST's parts: likeness of classes, finalised rows; its recipes, and what it can be put around."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import train, train_all
from PIL import Image

from bench.errors import UserError
from bench.method.registry import method
from bench.method.resolve import Resolved, resolve
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.store.results import Store
from methods.nest import ClassSimilarity, NeST, Transformation, finalised_classifier
from methods.pi import PathIntegral
from methods.plop import PLOP

Toy = Callable[..., Path]
SETTINGS = ("epochs=2", "first_epochs=1", "batch_size=4", "crop=32")


# ---- similarity and finalisation ---------------------------------------------------------------------------


def test_similarity_in_batches_is_that_of_single_images() -> None:
    torch.manual_seed(0)
    # single precision adds the pixels up to within 1e-5
    features, logits = torch.randn(6, 8, 4, 4).double(), torch.randn(6, 3, 32, 32).double()
    old = torch.randn(3, 8).double()
    labels = torch.randint(0, 5, (6, 32, 32))
    labels[labels == 1] = 255
    single, batched = ClassSimilarity(old, 2), ClassSimilarity(old, 2)
    for k in range(6):
        single.update(features[k : k + 1], logits[k : k + 1], labels[k : k + 1])
    batched.update(features[:4], logits[:4], labels[:4])
    batched.update(features[4:], logits[4:], labels[4:])
    assert torch.equal(single.pixels, batched.pixels)
    assert torch.allclose(single.importance(), batched.importance(), rtol=1e-12)
    assert torch.allclose(single.mixing(), batched.mixing(), rtol=1e-12)
    assert single.importance().min() >= 0
    assert single.importance().max() <= 1


def test_similarity_by_the_definition() -> None:
    """Pixel by pixel, class by class, feature by feature."""
    torch.manual_seed(1)
    n_old, side = 2, 128
    features, logits, old = (
        torch.randn(1, 3, side, side),
        torch.randn(1, n_old, side, side),
        torch.randn(n_old, 3),
    )
    labels = torch.zeros(1, side, side, dtype=torch.long)
    where = [(3, 5), (70, 70), (127, 0)]
    for y, x in where:
        labels[0, y, x] = n_old
    found = ClassSimilarity(old, 1)
    found.update(features, logits, labels)
    expected = np.zeros((n_old, 3))
    for y, x in where:
        p = logits[0, :, y, x].softmax(0)
        for c in range(n_old):
            for d in range(3):
                expected[c, d] += float(p[c]) * float(features[0, d, y, x] * old[c, d] > 0) / len(where)
    assert found.importance()[0].numpy() == pytest.approx(expected, rel=1e-5)


def test_generated_rows_take_the_scale_of_the_old_ones() -> None:
    torch.manual_seed(2)
    old, bias = torch.randn(4, 16), torch.randn(4)
    learned = Transformation(
        torch.rand(2, 4, 16), torch.rand(2, 4), torch.randn(2), torch.rand(1, 16), torch.rand(1, 1)
    )
    weight, new_bias = finalised_classifier(old, bias, learned)
    assert torch.equal(weight[1:4], old[1:])
    assert torch.equal(new_bias[:4], bias)
    assert weight[0].norm() == pytest.approx(old[0].norm())
    assert weight[4:].norm(dim=1).mean() == pytest.approx(old.norm(dim=1).mean())
    assert new_bias[4:].norm() == pytest.approx(bias.norm())
    assert torch.equal(new_bias[4:].sign(), learned.new_bias.sign())


def test_a_class_without_a_pixel_on_the_grid_is_named(toy: Toy, in_tmp: Path) -> None:
    protocol = toy(n_classes=4, images=12, size=320, then=1)
    # Of class 3, one pixel is left: the crop to 32 pixels loses it.
    for path in (in_tmp / "toy" / "masks").glob("train*.png"):
        mask = np.array(Image.open(path))
        there = np.argwhere(mask == 3)
        mask[mask == 3] = 0
        for y, x in there[:1]:
            mask[y, x] = 3
        Image.fromarray(mask).save(path)
    plan = make_plan([str(protocol)], ["nest+ft"], overrides=[*SETTINGS, "batch_size=2"])
    store = Store("r")
    first, second = list(plan.jobs)[:2]
    train(plan, store, first)
    words = r"class 3 \(c3\) has no pixel on NeST's grid of 128 x 128 in any of the \d+ training crops"
    with pytest.raises(UserError, match=f"step 1: {words}"):
        train(plan, store, second)


def test_a_smoke_run_passes_without_meeting_every_class(toy: Toy) -> None:
    protocol = toy(n_classes=12, images=48, first=2, then=10)
    few = [*SETTINGS, "batch_size=2"]  # four images show no ten classes
    plan = make_plan([str(protocol)], ["nest+mib"], overrides=few, smoke=True)
    store = Store("r", smoke=True)
    train_all(plan, store)
    assert all(store.done(key) for key in plan.jobs)


# ---- composition and recipes -------------------------------------------------------------------------------


def test_wrapper_and_wrapped_share_their_state() -> None:
    spec = method("nest+plop")
    built = spec.build(spec.config())
    assert isinstance(built, NeST)
    assert isinstance(built, PLOP)
    kinds = [kind.__name__ for kind in type(built).mro()]
    assert kinds.index("NeST") < kinds.index("PLOP") < kinds.index("Method")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nest", "write for example nest\\+ft"),
        ("nest+joint", "cannot wrap 'joint'"),
        ("nest+nest+ft", "cannot wrap 'nest\\+ft'"),
        ("nest+ssul", "works on a classifier of kind 'linear', and that of 'ssul' is 'conv-heads'"),
        ("mib+nest", "'mib' does not wrap another method"),
        ("nest+mibs", "did you mean 'mib'"),
        ("nest@swim+mib", "did you mean 'swin'"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_in_words(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        method(name)


def test_one_step_0_for_the_wrapped_method_and_every_composition_of_it(toy: Toy) -> None:
    plan = make_plan([str(toy(then=2))], ["ft", "mib", "nest+mib", "nest+plop"], overrides=[*SETTINGS])
    assert len({chain.keys[0] for chain in plan.chains}) == 1
    assert len({chain.keys[1] for chain in plan.chains}) == 4


def published(name: str, protocol: str) -> Resolved:
    return resolve(method(name), load(protocol), "published")


@pytest.mark.parametrize(
    ("name", "protocol", "values"),
    [
        (
            "nest+mib",
            "voc-15-1",
            {
                "epochs": 30,
                "pretuning_epochs": 5,
                "pretuning_lr_scale": 1,
                "distillation": 10,
                "freeze_old_classifier": False,
            },
        ),
        (
            "nest+mib",
            "voc-10-1",
            {"epochs": 10, "first_epochs": 30, "pretuning_epochs": 5, "network": "deeplab-abn-resnet101"},
        ),
        (
            "nest+mib",
            "ade-100-5",
            {"epochs": 60, "pretuning_epochs": 15, "pretuning_lr_scale": 500, "distillation": 10},
        ),
        ("nest+plop", "voc-15-1", {"pod": 0.01, "freeze_old_classifier": True, "precision": "fp16"}),
        ("nest+plop", "ade-100-5", {"pod": 0.001, "pod_logits": 1e-5, "freeze_old_classifier": False}),
        (
            "nest@swin+mib",
            "voc-15-1",
            {
                "network": "deeplab-abn-swin-b",
                "pretrained": "swin_base_patch4_window12_384.pth",
                "epochs": 30,
            },
        ),
    ],
)
def test_recipes_are_those_of_the_scripts(name: str, protocol: str, values: dict[str, Any]) -> None:
    config = published(name, protocol).config
    common = {
        "first_lr": 0.02,
        "lr": 0.001,
        "batch_size": 24,
        "crop": 512,
        "label_rule": "plop",
        "weight_decay": 1e-4,
        "selection": "last",
    }
    assert {key: getattr(config, key) for key in {**common, **values}} == {**common, **values}


def test_the_source_of_what_depends_on_the_wrapped_method_is_named() -> None:
    assert published("nest+mib", "voc-15-1").sources["distillation"] == "nest.toml [on.mib.published]"
    assert (
        published("nest+plop", "voc-15-1").sources["freeze_old_classifier"]
        == "nest.toml [on.plop.method], data set voc"
    )


def test_a_path_integral_starts_where_the_wrapped_training_does() -> None:
    """Pre-tuning writes new rows after the step began.

    The way is measured from what the first update of the main phase sees.
    """
    recorder = PathIntegral({})
    recorder.begin({"w": torch.tensor([1.0])}, {})
    recorder.update({"w": torch.tensor([3.0])}, {"w": torch.tensor([5.0])})
    recorder.update({"w": torch.tensor([-2.0])}, {"w": torch.tensor([6.0])})
    recorder.finish({"w": torch.tensor([7.0])})
    assert recorder.state["path.score.w"].item() == pytest.approx(-2 * (5 - 6) / (7 - 5) ** 2)
