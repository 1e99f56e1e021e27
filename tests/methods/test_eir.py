"""EIR: pasting, the region-specific distillation, and instances in memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import images_of, memory_of, records_of
from plans import config_of

import bench
from bench.errors import UserError
from bench.method.registry import method
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.store.results import Store
from methods import eir

Toy = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


# ---- losses ------------------------------------------------------------------------------------------------


def test_soft_targets_leave_out_pixels_without_a_target() -> None:
    logits, labels = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 2], [255, 1]]])
    targets = eir.one_hot(labels, 3)
    assert targets.sum(1).tolist() == [[[1, 1], [0, 1]]]
    each = eir.soft_multi_label_bce(logits, targets, "none")
    assert each[0, 1, 0] == 0
    torch.testing.assert_close(eir.soft_multi_label_bce(logits, targets), each.sum() / 3)


def test_without_any_target_the_mean_is_of_nothing_and_nothing_is_learned() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = eir.soft_multi_label_bce(logits, torch.zeros(1, 3, 2, 2))
    loss.backward()
    assert loss.isnan()
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("n_new", [1, 3])
def test_the_distillation_rests_where_new_classes_take_the_old_background(n_new: int) -> None:
    old = torch.tensor([0.5, 0.2, 0.3]).log()
    background = torch.full((n_new,), 0.5 / n_new).log()
    logits = torch.cat([torch.tensor([-50.0]), old[1:], background]).view(1, -1, 1, 1).requires_grad_()
    eir.region_distillation(logits, old.view(1, 3, 1, 1)).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_as_published_the_first_new_class_is_missing_and_a_single_one_gives_infinity() -> None:
    logits, old = torch.randn(1, 5, 2, 2), torch.randn(1, 3, 2, 2)
    assert eir.region_distillation(logits, old, index="as_published") > eir.region_distillation(logits, old)
    assert eir.region_distillation(logits[:, :4], old, index="as_published") == torch.inf


def test_the_region_counts_all_pixels_in_the_divisor() -> None:
    logits, old = torch.randn(1, 5, 2, 2), torch.randn(1, 3, 2, 2)
    region = torch.tensor([[[True, False], [False, False]]])
    alone = eir.region_distillation(logits[..., :1, :1], old[..., :1, :1])
    torch.testing.assert_close(eir.region_distillation(logits, old, region), alone / 4)


# ---- pasting -----------------------------------------------------------------------------------------------


def canvas(n_classes: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A black image and background targets."""
    return torch.zeros(3, size, size), eir.one_hot(torch.zeros(1, size, size, dtype=torch.long), n_classes)[0]


def test_an_instance_is_scaled_to_its_window_and_blended() -> None:
    image, targets = canvas(4, 96)
    instance, labels = torch.ones(3, 96, 96), torch.zeros(96, 96, dtype=torch.uint8)
    labels[10:20, 30:50] = 2  # 10 x 20 pixels, scaled by 46 / 21 to 21 x 43
    eir.paste_instance(image, targets, instance, labels, 2, 0.25, (46, 0), 46)
    rows, columns = (image[0] > 0).nonzero().T
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (46, 66, 0, 42)
    assert image[:, 50, 10].tolist() == [0.25] * 3
    assert targets[:, 50, 10].tolist() == [0.75, 0, 0.25, 0]
    assert targets[:, 10, 10].tolist() == [1, 0, 0, 0]


def test_void_pixels_under_a_pasted_instance_get_its_share_alone() -> None:
    image, targets = canvas(3, 96)
    targets.zero_()
    labels = torch.ones(96, 96, dtype=torch.uint8)
    eir.paste_instance(image, targets, torch.ones(3, 96, 96), labels, 1, 0.25, (0, 0), 46)
    torch.testing.assert_close(targets[:, 5, 5], torch.tensor([0, 0.25, 0]))


@pytest.mark.parametrize(
    "box",
    [
        (slice(5, 6), slice(5, 40)),
        (slice(5, 40), slice(5, 6)),
        (slice(0, 96), slice(7, 9)),
        (slice(0, 0), slice(0, 0)),
    ],
)
def test_what_is_too_thin_is_not_pasted(box: tuple[slice, slice]) -> None:
    image, targets = canvas(3, 96)
    labels = torch.zeros(96, 96, dtype=torch.uint8)
    labels[box] = 1
    before = targets.clone()
    eir.paste_instance(image, targets, torch.ones(3, 96, 96), labels, 1, 0.5, (0, 0), 46)
    assert not image.any()
    assert torch.equal(targets, before)


def test_a_window_that_would_leave_the_image_is_shifted() -> None:
    assert eir.shifted_inside(250, 249, 512) == slice(250, 499)
    assert eir.shifted_inside(300, 249, 512) == slice(262, 511)


def test_the_emptiest_windows_come_first_and_ties_in_the_order_of_the_grid() -> None:
    foreground = torch.zeros(2, 96, 96, dtype=torch.long)
    foreground[0, :46, :46] = 3
    foreground[1, 60, 60] = 1
    corners, zeros = eir.background_regions(foreground, 46)
    assert corners.tolist() == [[[0, 46], [46, 0], [46, 46]], [[0, 0], [0, 46], [46, 0]]]
    assert zeros.tolist() == [[2116] * 3] * 2


@pytest.fixture
def pasting() -> Any:
    """EIR in a step with five old classes, two exemplars each but for class 3."""
    spec = method("eir")
    built: Any = spec.build(spec.config(crop=96))
    built.step = load("shapes-6-2").step(1)
    built.buckets = {c: [2 * c, 2 * c + 1] for c in (1, 2, 4, 5, 6)}
    built.generators["paste"] = random.Random(0)
    return built


def test_each_class_that_only_the_old_network_sees_gets_a_place_of_its_own(pasting: Any) -> None:
    labels = torch.zeros(1, 96, 96, dtype=torch.long)
    pseudo_labels = labels.clone()
    pseudo_labels[0, :4, 0], pseudo_labels[0, :4, 50], pseudo_labels[0, 50, 0] = 5, 2, 1
    pastes = pasting.draw_pastes(labels, pseudo_labels, 46)
    assert [(p.instance_class, p.place) for p in pastes] == [(1, [46, 46]), (2, [46, 0]), (5, [0, 0])]
    assert all(p.exemplar in pasting.buckets[p.instance_class] and 0 <= p.share <= 1 for p in pastes)


def test_with_fewer_than_two_random_classes_pile_up_on_the_first_place(pasting: Any) -> None:
    labels = torch.zeros(200, 96, 96, dtype=torch.long)
    pseudo_labels = labels.clone()
    pseudo_labels[:100, 0, 0] = 4
    pastes = pasting.draw_pastes(labels, pseudo_labels, 46)
    drawn = {p.instance_class for p in pastes if p.row >= 100}
    assert drawn == {1, 2, 4, 5}  # no exemplar of class 3; and the last old class, 6, is never drawn
    assert all(p.place == [0, 0] for p in pastes if p.row >= 100)
    assert all(p.place == [0, 46] for p in pastes if p.row < 100)
    assert next(p.instance_class for p in pastes if p.row == 0) == 4
    assert max(sum(p.row == row for p in pastes) for row in range(200)) == 3


# ---- memory ------------------------------------------------------------------------------------------------


def test_pieces_that_touch_at_a_corner_are_two() -> None:
    one, two = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    one[1, 1:3] = 1
    two[1, 1] = two[2, 2] = 1
    two[0, 3] = 255
    assert eir.is_single_component(one)
    assert not eir.is_single_component(two)
    assert eir.single_instances(torch.from_numpy(np.stack([one, two, 0 * one])).long()) == [[1], None, []]


def test_only_stored_classes_come_back_and_the_rest_is_the_mean_colour() -> None:
    labels = eir.stored_only(np.array([[0, 1, 2], [3, 255, 2]], np.uint8), [2, 255])
    assert labels.tolist() == [[0, 0, 2], [0, 0, 2]]
    images = eir.cut_out(torch.ones(1, 3, 2, 3), torch.from_numpy(labels)[None])
    assert images[0, 0].tolist() == [[0, 0, 1], [0, 0, 1]]


def train(protocol: Path, settings: list[str]) -> list[Path]:
    run = bench.run(str(protocol), ["eir"], cluster="inline", set=settings, results="results")
    assert run.outcome.ok
    return [Store("results").artifact(key) for key in run.plan.chains[0].keys]


def test_memory_is_handed_from_step_to_step_and_in_the_artifact(toy: Toy, quick: list[str]) -> None:
    protocol = toy(n_classes=4, images=40, first=2, then=1)
    first, second, third = train(protocol, [*quick, "memory_size=6"])
    images = images_of(protocol)
    assert memory_of(first) == []
    before: set[str] = set()
    for t, folder in ((1, second), (2, third)):
        records = records_of(folder)
        assert memory_of(folder) == sorted(record.name for record in records)
        assert 0 < len(records) <= 6
        assert {r.name for r in records} <= before | set(images[t - 1])
        assert {r.drawn_for for r in records} == set(range(1, t + 2))
        lines = (folder / "train.jsonl").read_text().splitlines()
        assert len(lines) == (len(images[t]) + len(records)) // 4  # one epoch is one pass over both
        before = {r.name for r in records}


def test_a_memory_larger_than_the_images_holds_every_candidate_once(toy: Toy, quick: list[str]) -> None:
    protocol = toy(n_classes=4, images=20, then=2)
    folder = train(protocol, [*quick, "memory_size=1000"])[-1]
    memory = memory_of(folder)
    images = images_of(protocol)
    assert 0 < len(memory) == len(set(memory))
    assert set(memory) <= set(images[0])
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert len(lines) == (len(images[1]) + len(memory)) // 4
    enough = train(protocol, [*quick, f"memory_size={len(memory)}"])[-1]
    assert memory_of(enough) == memory
    assert (enough / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_region_and_index_change_the_distillation_and_no_memory_is_allowed(
    toy: Toy, quick: list[str]
) -> None:
    protocol, weights = toy(n_classes=4, images=40, then=2), set()
    for settings in ([], ["region=all"], ["index=as_published"], ["memory_size=0"]):
        folder = train(protocol, [*quick, *settings])[-1]
        weights.add((folder / "model.safetensors").read_bytes())
    assert len(weights) == 4
    assert memory_of(folder) == []


def test_as_published_refuses_a_step_with_one_class(toy: Toy, quick: list[str]) -> None:
    words = "eir.index = 'as_published' is infinite in a step with one class; use 'fixed'"
    with pytest.raises(UserError, match=f"toy-2-1, step 1: {words}"):
        make_plan([str(toy(then=1))], ["eir"], overrides=[*quick, "index=as_published"])


def test_it_is_named_a_reconstruction_with_its_choices() -> None:
    spec = method("eir")
    assert spec.title == "EIR (reconstruction)"
    notes = eir.EIR.footnotes(eir.EIR.Config(region="all", memory_size=7))
    assert any(note.startswith("reconstruction") for note in notes)
    assert "memory of 7 images" in notes
    assert "region-specific distillation: region all, index fixed" in notes


def test_published_settings() -> None:
    voc = config_of("eir", "voc-15-1")
    assert (voc.first_lr, voc.lr, voc.body_lr, voc.first_body_lr, voc.epochs, voc.batch_size) == (
        0.01,
        0.001,
        0.1,
        0.1,
        60,
        32,
    )
    assert (voc.memory_size, voc.region, voc.index, voc.label_rule, voc.network) == (
        100,
        "new",
        "fixed",
        "eir",
        "deeplab-dkd-resnet101",
    )
    assert config_of("eir", "voc-5-3").batch_size == 24
    assert config_of("eir", "ade-100-10").memory_size == 300


def test_choices_that_only_later_steps_use_share_step_0(toy: Toy) -> None:
    protocol = str(toy())
    settings = (["batch_size=4"], ["batch_size=4", "region=all", "memory_size=3", "threshold=0.6"])
    plain, other = (
        make_plan([protocol], ["eir"], overrides=overrides).chains[0].keys for overrides in settings
    )
    assert plain[0] == other[0]
    assert not set(plain[1:]) & set(other[1:])
