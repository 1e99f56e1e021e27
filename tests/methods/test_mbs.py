"""MBS: its losses where a picture of them can be drawn by hand, its recipe, and all its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bench
from bench.data.dataset import IGNORE
from bench.errors import UserError
from bench.method.batch import Batch
from bench.method.registry import method
from bench.method.resolve import resolve
from bench.method.settings import TRAINING
from bench.models.build import build_network
from bench.plan.make import footnotes_of, make_plan
from bench.protocol.file import load
from bench.protocol.protocol import Step
from bench.train.tensors import read_tensors
from methods import mbs

Toy = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def logits_of(*pixels: list[float]) -> Tensor:
    """Logits [1, C, 1, W] with these probabilities in each pixel."""
    return torch.tensor(pixels).T[None, :, None].log()


# ---- losses ------------------------------------------------------------------------------------------------


def test_background_becomes_a_class_or_stays_or_is_ignored() -> None:
    old = logits_of(
        [0.1, 0.8, 0.1],
        [0.25, 0.7, 0.05],
        [0.45, 0.45, 0.1],
        [0.55, 0.4, 0.05],
        [0.0, 1.0, 0.0],
        [0.0, 1.0, 0.0],
    )
    labels = torch.tensor([[[0, 0, 0, 0, 3, IGNORE]]])
    assert mbs.selective_pseudo_labels(old, labels, 0.75).tolist() == [[[1, IGNORE, IGNORE, 0, 3, IGNORE]]]
    assert mbs.selective_pseudo_labels(old, labels, 0.69).tolist() == [[[1, 1, IGNORE, 0, 3, IGNORE]]]


def test_patches_are_held_where_they_are_old() -> None:
    old = logits_of(*[[0.6, 0.4]] * 4)
    labels = torch.tensor([[[0.0, 1.0, 2.0, float(IGNORE)]]])
    torch.testing.assert_close(
        mbs.feature_distillation_weight_map(old, labels, [2, 3]), torch.tensor([[[0.6, 1.0, 0.0, 0.0]]])
    )


def test_the_divisor_counts_elements_and_not_weights() -> None:
    old, new = torch.zeros(1, 4, 3), torch.ones(1, 4, 3)
    assert mbs.adaptive_feature_distillation(new, old, torch.tensor([[0.5, 0.25, 0.0, 0.0]])) == 0.375
    assert mbs.adaptive_feature_distillation(new, old) == 1


def test_nothing_to_hold_is_no_loss_and_no_gradient() -> None:
    features = torch.randn(2, 4, 3, requires_grad=True)
    loss = mbs.adaptive_feature_distillation(features, torch.randn(2, 4, 3), torch.zeros(2, 4))
    loss.backward()
    assert loss == 0
    assert features.grad is not None
    assert not features.grad.any()


def test_half_precision_features_do_not_overflow() -> None:
    features = torch.full((1, 64, 64), 300.0, dtype=torch.float16)
    assert mbs.adaptive_feature_distillation(features, torch.zeros_like(features)) == 90_000


def test_the_background_goes_to_the_new_class_that_is_there() -> None:
    old = logits_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2])
    labels = torch.tensor([[[0, 4, IGNORE]]])
    logits = torch.randn(1, 5, 1, 3)
    target = logits_of([0.5, 0.3, 0.2, 0.0, 0.0], [0.0, 0.3, 0.2, 0.0, 0.5], [0.5, 0.3, 0.2, 0.0, 0.0]).exp()
    want = -(target * logits.log_softmax(1)).sum(1).mean() / 5
    torch.testing.assert_close(mbs.label_guided_output_distillation(logits, old, labels), want)


def test_only_new_tokens_feel_the_orthogonality() -> None:
    tokens = torch.randn(1, 5, 8, requires_grad=True)
    mbs.class_token_orthogonality(tokens, 3, 0.4).backward()
    assert tokens.grad is not None
    assert not tokens.grad[:, :3].any()
    assert tokens.grad[:, 3:].flatten(2).any(-1).all()


def test_orthogonality_of_orthogonal_equal_and_repeated_tokens() -> None:
    basis = torch.eye(4)[None]
    assert mbs.class_token_orthogonality(basis, 2, 1.0) == 0
    assert mbs.class_token_orthogonality(torch.ones(1, 4, 4), 3, 0.25) == 0.25
    tokens = torch.randn(1, 4, 6)
    torch.testing.assert_close(
        mbs.class_token_orthogonality(tokens.expand(3, -1, -1), 2, 1.0),
        mbs.class_token_orthogonality(tokens, 2, 1.0),
    )


# ---- the method --------------------------------------------------------------------------------------------


def attached(step: Step) -> mbs.MBS:
    """The method at step 1, its small network grown, beside its teacher."""
    torch.manual_seed(1)
    spec = method("mbs")
    found = spec.build(spec.config())
    sizes = [len(step.old) + 1, len(step.classes)]
    network: Any = build_network("small-vit", found.heads(sizes[:1]), spec.classifier)
    teacher = build_network("small-vit", found.heads(sizes[:1]), spec.classifier).eval().requires_grad_(False)
    network.classifier.grow(sizes[1])
    found.step, found.network, found.teacher = step, network, teacher
    found.init_classifier()
    assert isinstance(found, mbs.MBS)
    return found


def test_background_has_a_head_of_its_own() -> None:
    assert attached(Step(1, (4,), (1, 2, 3))).network.classifier.sizes == [1, 3, 1]


def test_new_tokens_start_as_the_background() -> None:
    background, old, new = attached(Step(1, (4, 5), (1, 2, 3))).network.classifier.heads
    assert torch.equal(new.tokens, background.tokens.expand(-1, 2, -1))
    assert not torch.equal(old.tokens[:, :1], background.tokens)
    assert new.scale.tolist() == [1, 1]
    assert new.shift.tolist() == [0, 0]


def test_a_permuted_order_of_classes_changes_nothing() -> None:
    """Labels, and the classes of a step, are positions.

    The released code's raw ids are right in the standard order only.
    """
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 4, (2, 32, 32))
    found = []
    for step in (Step(1, (3,), (1, 2)), Step(1, (1,), (3, 2))):
        m = attached(step)
        m.network.eval()
        found.append(
            {
                name: term.item()
                for name, term in m.losses(Batch(images, labels, m.network, m.teacher)).items()
            }
        )
    assert found[0] == found[1]
    assert set(found[0]) == {"ce", "patches", "tokens", "output", "orthogonality"}
    assert all(value > 0 for value in found[0].values())


def test_the_teacher_gets_no_gradient_and_everything_else_trains() -> None:
    m = attached(Step(1, (3,), (1, 2)))
    batch = Batch(torch.randn(2, 3, 32, 32), torch.randint(0, 4, (2, 32, 32)), m.network.train(), m.teacher)
    torch.stack(list(m.losses(batch).values())).sum().backward()
    assert [name for name, p in m.network.named_parameters() if p.grad is None] == []
    assert not batch.teacher.logits.requires_grad


# ---- recipe and plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "values"),
    [
        ("voc-15-1", {"epochs": 32, "batch_size": 16, "lr": 1e-4, "output_distillation": 25}),
        ("voc-10-1", {"epochs": 32, "batch_size": 16, "lr": 1e-4, "output_distillation": 25}),
        ("ade-100-50", {"epochs": 64, "batch_size": 8, "lr": 5e-4, "output_distillation": 50}),
        ("ade-100-5", {"epochs": 64, "batch_size": 8, "lr": 5e-4, "output_distillation": 50}),
    ],
)
def test_published_settings(protocol: str, values: dict[str, Any]) -> None:
    everywhere = {
        "network": "segmenter-vit-b16", "crop": 512, "augmentation": "resize-scale-crop", "label_rule": "mbs",
        "first_lr": 1e-3, "schedule": "constant", "weight_decay": 1e-5, "momentum": 0.9, "precision": "fp16",
        "selection": "best-on-test", "threshold": 0.7,
    }  # fmt: skip
    config = resolve(method("mbs"), load(protocol), "published").config
    assert {name: getattr(config, name) for name in (*everywhere, *values)} == {**everywhere, **values}


def test_a_fair_comparison_is_told_what_differs() -> None:
    spec = method("mbs")
    notes = footnotes_of(spec, resolve(spec, load("voc-15-1"), "published"), load("voc-15-1"))
    for said in (
        "its network is not the other methods'",
        "padding around images is trained as background",
        "best on the test images",
    ):
        assert any(said in note for note in notes), said
    assert not any("224 pixels" in note for note in notes)
    assert any(
        "224 pixels" in note
        for note in footnotes_of(spec, resolve(spec, load("voc-15-1"), "controlled"), load("voc-15-1"))
    )
    assert len(footnotes_of(spec, resolve(spec, load("shapes-6-2"), "small"), load("shapes-6-2"))) == 1


@pytest.mark.parametrize("track", ["controlled", "small"])
def test_the_tracks_differ_from_those_of_others_in_the_network_alone(track: str) -> None:
    mine, other = (resolve(method(name), load("voc-15-1"), track).config for name in ("mbs", "mib"))
    assert {name for name in TRAINING if getattr(mine, name) != getattr(other, name)} == {"network"}


def test_planning_refuses_a_network_without_tokens(toy: Toy) -> None:
    with pytest.raises(UserError, match="network = 'small': has no tokens"):
        make_plan([str(toy())], ["mbs"], overrides=["mbs.network=small"])


def test_step_0_is_its_own_and_does_not_depend_on_what_comes_later(toy: Toy, quick: list[str]) -> None:
    protocol = str(toy(then=2))
    keys = {}
    for name, more in {
        "as it is": [],
        "threshold": ["mbs.threshold=0.5"],
        "weight": ["mbs.output_distillation=50"],
    }.items():
        first, second = make_plan([protocol], ["mbs"], overrides=[*quick, *more]).jobs
        keys[name] = (first, second)
    assert len({first for first, _ in keys.values()}) == 1
    assert len({second for _, second in keys.values()}) == 3
    assert len(make_plan([protocol], ["mbs", "ft"], overrides=quick).jobs) == 4


# ---- all steps ---------------------------------------------------------------------------------------------


def test_all_steps_run_and_leave_what_the_next_one_needs(toy: Toy, in_tmp: Path) -> None:
    protocol = str(toy(images=24, first=2, then=1))
    run = bench.run(
        protocol,
        ["mbs"],
        cluster="inline",
        results="r",
        set=["first_epochs=2", "epochs=1", "batch_size=4", "crop=32"],
    )
    assert run.outcome.ok
    folders = [in_tmp / "r" / "jobs" / key for key in run.plan.jobs]
    heads = [[1, 2], [1, 2, 1], [1, 2, 1, 1]]
    for folder, sizes in zip(folders, heads, strict=True):
        tensors, _ = read_tensors(folder / "model.safetensors")
        assert [tensors[f"classifier.heads.{k}.tokens"].shape[1] for k in range(len(sizes))] == sizes
        assert f"classifier.heads.{len(sizes)}.tokens" not in tensors
    terms = [
        set(json.loads((folder / "train.jsonl").read_text().splitlines()[0]))
        - {"phase", "epoch", "iteration", "lr"}
        for folder in folders
    ]
    later = {"ce", "patches", "tokens", "output", "orthogonality"}
    assert terms == [{"ce"}, later, later]
