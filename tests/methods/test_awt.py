"""AWT: a chain of three steps against the same chain computed straight on, attribution, compositions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from chains import Done, cross_entropy, fit, given_batches, mib_losses, run_chain
from jobs import files, interrupted, train, train_all
from plans import plan_of
from torch import Tensor, nn

import bench.testing.networks  # names the network "tiny"
from bench.data.dataset import IGNORE
from bench.errors import UserError
from bench.method.registry import method
from bench.method.resolve import resolve
from bench.models.classifier import LinearClassifier
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.store.results import Store
from bench.testing.tensors import TensorBatch
from methods.awt import Attribution, best_channels, transfer_background

Toy = Callable[..., Path]
SIZES = (3, 2, 1)
assert bench.testing.networks.TINY == "tiny"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


# ---- a chain, straight on ----------------------------------------------------------------------------------


def integrated_gradients(network: nn.Module, images: Tensor, steps: int = 8) -> Tensor:
    """Layer integrated gradients of the background's score, summed over the image, at the features that the
    classifier reads; the baseline is an image of zeros. [B, D, h, w]"""
    features, baseline = network(images).features, network(torch.zeros_like(images)).features
    row = network.get_parameter("classifier.heads.0.weight")[:1]
    total = torch.zeros_like(features)
    for k in range(steps):
        point = (baseline + (k + 0.5) / steps * (features - baseline)).detach().requires_grad_()
        score = nn.functional.interpolate(
            nn.functional.conv2d(point, row), images.shape[-2:], mode="bilinear", align_corners=False
        )
        total += torch.autograd.grad(score.sum(), point)[0] / steps
    return (features - baseline) * total


def channels_of(network: nn.Module, batches: Sequence[TensorBatch], groups: list[list[int]]) -> Tensor:
    """The best quarter of the channels for each group of labels; a group's maps are never emptied."""
    chosen, maps = [], []
    for group in groups:
        for batch in batches:
            attributed = integrated_gradients(network, batch["images"])
            stride = batch["labels"].shape[-1] // attributed.shape[-1]
            small = batch["labels"][:, ::stride, ::stride]
            for one, labels in zip(attributed, small, strict=True):
                mask = sum((labels == c).double() for c in group)
                assert isinstance(mask, Tensor)
                if mask.any():
                    maps.append(one * mask)
        score = torch.stack(maps).mean(0).flatten(1).max(1).values
        order = sorted(range(len(score)), key=lambda c: -score[c].item())
        chosen.append([1.0 if c in order[: len(order) // 4] else 0.0 for c in range(len(order))])
    return torch.tensor(chosen, dtype=torch.float64)


def straight(
    chain: list[Done], accumulated: bool
) -> list[tuple[list[dict[str, float]], dict[str, Tensor], Tensor | None]]:
    """AWT around MiB from the specification: (losses, weights that the step leaves, channels) of each step.

    Source: spec/awt.md section 1, section 2 and section 3.
    """
    network: nn.Module = copy.deepcopy(chain[0].opened)
    losses = fit(
        network,
        list(network.parameters()),
        chain[0].batches,
        0.05,
        lambda z, b: cross_entropy(z, b["labels"]),
    )
    found: list[tuple[list[dict[str, float]], dict[str, Tensor], Tensor | None]] = []
    found.append((losses, {k: v.clone() for k, v in network.state_dict().items()}, None))
    for t in (1, 2):
        old = copy.deepcopy(network).eval().requires_grad_(False)
        network = copy.deepcopy(chain[t].opened)
        new_head = {k: v for k, v in network.state_dict().items() if k not in old.state_dict()}
        network.load_state_dict({**old.state_dict(), **new_head})
        new = list(range(sum(SIZES[:t]), sum(SIZES[: t + 1])))
        groups = [[c] for c in new] if accumulated else [new]
        channels = channels_of(old, chain[t].batches, groups)
        with torch.no_grad():
            row = network.get_parameter("classifier.heads.0.weight")[0, :, 0, 0]
            rows = network.get_parameter(f"classifier.heads.{t}.weight")
            for n in range(len(new)):
                rows[n, :, 0, 0] += row * channels[n if accumulated else 0]

        def step_losses(z: Tensor, b: TensorBatch, old: nn.Module = old) -> dict[str, Tensor]:
            return mib_losses(z, old(b["images"]).logits, b["labels"], 10.0)

        losses = fit(network, list(network.parameters()), chain[t].batches, 0.02, step_losses)
        found.append((losses, {k: v.clone() for k, v in network.state_dict().items()}, channels))
    return found


@pytest.mark.parametrize("attribution", ["union", "accumulated"])
def test_three_steps_are_those_of_the_specification(in_tmp: Path, attribution: str) -> None:
    chain = run_chain(in_tmp / "r", "awt+mib", SIZES, given_batches(SIZES), [f'attribution="{attribution}"'])
    for t, (losses, weights, _) in enumerate(straight(chain, attribution == "accumulated")):
        assert len(losses) == len(chain[t].losses) == 3
        for got, want in zip(chain[t].losses, losses, strict=True):
            assert got == pytest.approx(want, rel=1e-9)
        assert set(weights) == set(chain[t].weights)
        for name, weight in weights.items():
            torch.testing.assert_close(
                chain[t].weights[name], weight, rtol=1e-8, atol=1e-11, msg=f"step {t}: {name}"
            )


# ---- attribution -------------------------------------------------------------------------------------------

MAPS = torch.tensor([[[[5.0, 0.0]], [[0.0, 1.0]]], [[[0.0, 7.0]], [[2.0, 3.0]]]])  # [2, 2, 1, 2]
LABELS = torch.tensor([[[3, 4]], [[4, 0]]])


def attributed(groups: list[list[int]], limit: int | None = None) -> Attribution:
    found = Attribution(torch.tensor([1.0, -1.0]), groups, limit)
    found.update(MAPS, torch.zeros(1, 2, 1, 2), LABELS, range(2))
    return found


def test_the_mean_over_images_then_the_signed_maximum_over_positions() -> None:
    assert attributed([[3, 4]]).scores().tolist() == [[2.5, -0.5]]
    assert attributed([[3], [4]]).scores().tolist() == [[5.0, 0.0], [0.0, -0.5]]


def test_maps_of_earlier_classes_count_as_published_and_not_in_the_corrected_form() -> None:
    found = attributed([[3], [4]])
    assert found.scores(accumulated=True)[1].tolist() == pytest.approx([5 / 3, -1 / 3])
    assert found.scores()[1].tolist() != found.scores(accumulated=True)[1].tolist()
    assert found.scores()[0].tolist() == found.scores(accumulated=True)[0].tolist()


def test_it_ends_with_the_first_image_of_the_class_at_the_limit() -> None:
    assert attributed([[3], [4]], limit=0).images.tolist() == [1, 1]
    assert attributed([[4]], limit=1).images.tolist() == [2]
    assert attributed([[9]], limit=0).images.tolist() == [0]


def test_an_image_whose_mask_is_empty_is_not_counted() -> None:
    labels = torch.tensor([[[IGNORE, 0]], [[4, 0]]])
    found = Attribution(torch.ones(2), [[4]])
    found.update(MAPS, torch.zeros(1, 2, 1, 2), labels, range(2))
    assert found.images.tolist() == [1]


def test_a_class_without_an_image_has_no_channels() -> None:
    scores = attributed([[9], [3]]).scores()
    assert best_channels(scores, 50).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(("percent", "channels"), [(10, 26), (25, 64), (50, 128), (75, 192), (100, 256)])
def test_the_number_of_channels(percent: float, channels: int) -> None:
    assert best_channels(torch.randn(3, 256), percent).sum(1).tolist() == [channels] * 3


def test_biases_and_old_rows_stay() -> None:
    classifier = LinearClassifier(4, [2, 2])
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    transfer_background(classifier, torch.tensor([[True, False, False, False], [False, True, True, False]]))
    changed = classifier.state_dict()
    moved = (changed["heads.1.weight"] - before["heads.1.weight"])[:, :, 0, 0]
    row = before["heads.0.weight"][0, :, 0, 0]
    expected = torch.stack([row * torch.tensor([1.0, 0, 0, 0]), row * torch.tensor([0, 1.0, 1, 0])])
    torch.testing.assert_close(moved, expected)
    assert all(torch.equal(before[k], changed[k]) for k in before if k != "heads.1.weight")


# ---- step 0, compositions ----------------------------------------------------------------------------------


def test_step_0_is_that_of_the_wrapped_method() -> None:
    plan = plan_of(["ft", "mib", "awt+mib", "awt+plop", "ewf+awt+mib"])
    assert len({chain.keys[0] for chain in plan.chains}) == 1
    assert len({chain.keys[1] for chain in plan.chains}) == 5


def test_the_corrected_variant_is_another_job_where_each_class_has_its_channels() -> None:
    found = {
        (name, task): resolve(method(name), load(task), "controlled").config.model_dump()["attribution"]
        for name in ("awt+mib", "awt@corrected+mib")
        for task in ("ade-100-50", "voc-15-1")
    }
    assert found["awt+mib", "ade-100-50"] == "accumulated"
    assert found["awt@corrected+mib", "ade-100-50"] == "per-class"
    assert found["awt+mib", "voc-15-1"] == found["awt@corrected+mib", "voc-15-1"] == "union"


def test_a_word_that_is_none_is_one_line() -> None:
    with pytest.raises(UserError, match="attribution"):
        resolve(method("awt+mib"), load("shapes-6-2"), "small", [("attribution", "each")])


@pytest.mark.parametrize("name", ["awt+plop", "ewf+awt+mib"])
def test_an_interrupted_step_ends_with_the_same_bits(toy: Toy, in_tmp: Path, name: str) -> None:
    settings = ['network="tiny"', "epochs=2", "first_epochs=1", "batch_size=4", "crop=32"]
    plan = make_plan([str(toy(then=2))], [name], overrides=[*settings, 'attribution="per-class"'])
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    train_all(plan, whole)
    with pytest.raises(KeyboardInterrupt):
        train_all(plan, broken, interrupted(1))
    train(plan, broken, list(plan.jobs)[-1])
    assert files(whole, plan) == files(broken, plan)
