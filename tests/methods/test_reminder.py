"""REMINDER: a chain of three steps against the same chain computed straight on; its first step is FT's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chains import cross_entropy, fit, given_batches, run_chain
from plans import plan_of
from torch import Tensor, nn

from bench.testing.tensors import TensorBatch
from methods.plop import EntropyThresholds
from methods.reminder import PrototypeMean, batch_prototypes, class_similarity_distillation

SIZES = (3, 2, 1)
OFF = ("pod=0", "pod_logits=0")
"""Local POD is PLOP's; a chain of its authors holds it."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def means(features: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """Mean feature of each class that a batch shows, from the definition."""
    resized = F.interpolate(features, size=labels.shape[-2:], mode="bilinear", align_corners=True)
    pixels = resized.permute(0, 2, 3, 1)
    return {int(c): pixels[labels == c].mean(0) for c in labels.unique() if c != 255}


@torch.no_grad()
def straight_prototypes(network: nn.Module, batches: list[TensorBatch], first: int, there: int) -> Tensor:
    """Mean over batches, of the classes first … there - 1."""
    found: dict[int, list[Tensor]] = {}
    for batch in batches:
        for c, mean in means(network(batch["images"]).features, batch["labels"]).items():
            found.setdefault(c, []).append(mean)
    return torch.stack([torch.stack(found[c]).mean(0) for c in range(first, there)])


def straight_csw(
    z: Tensor, old: Tensor, labels: Tensor, features: Tensor, kept: Tensor, delta: float
) -> Tensor:
    """Pixel by pixel.

    Source: spec/reminder.md section 2.
    """
    n, terms, own = old.shape[1], [], means(features.detach(), labels)
    for b, i, j in (labels >= n).logical_and(labels != 255).nonzero().tolist():
        prototype = own[int(labels[b, i, j])]
        cosine = torch.stack([F.cosine_similarity(prototype, kept[k], dim=0) for k in range(n)])
        r = cosine.exp() / cosine.exp().sum()
        r = r * (r >= delta / n)
        target = (old[b, :, i, j] / 3).softmax(0) * r + 1e-7
        terms.append(-(target * (z[b, :n, i, j] / 3).log_softmax(0)).sum())
    return 9 * torch.stack(terms).mean()


def losses_of(
    old: nn.Module, tau: Tensor, seen: list[Tensor], kept: Tensor, delta: float, cuts: list[bool]
) -> Callable[[Tensor, TensorBatch], dict[str, Tensor]]:
    """PLOP's cross-entropy and REMINDER's distillation of one batch, from probabilities.

    Args:
        old: the old network.
        tau: PLOP's threshold of each class.
        seen: the network's features, the last batch's last.
        kept: prototypes of the old classes.
        delta: below delta / C_old a similarity counts as 0.
        cuts: grows by whether that made a difference.
    """

    def losses(z: Tensor, b: TensorBatch) -> dict[str, Tensor]:
        before, y = old(b["images"]).logits, b["labels"]
        n = before.shape[1]
        p = before.softmax(1)
        entropy = -(p * (p + 1e-8).log()).mean(1) / math.log(n + 1e-8) / math.log(len(tau))
        sure, old_pixel = entropy < tau[p.argmax(1)], y < n
        targets = torch.where(old_pixel, torch.where(sure, p.argmax(1), 255), y)
        factor = (sure & old_pixel).sum((1, 2)) / (old_pixel.sum((1, 2)) + 1e-6)
        valid = targets != 255
        log_p = z.log_softmax(1).gather(1, torch.where(valid, targets, 0)[:, None])[:, 0]
        ce = -(log_p * valid * factor.double()[:, None, None]).mean()
        csw = straight_csw(z, before, y, seen[-1], kept, delta)
        whole = straight_csw(z, before, y, seen[-1], kept, 0.0)
        cuts.append(bool(whole > csw * (1 + 1e-6)))
        return {"ce": ce, "pod": z.new_zeros(()), "csw": 0.5 * csw}

    return losses


def test_three_steps_are_those_of_the_specification(in_tmp: Path) -> None:
    """Losses of every iteration, weights and prototypes after each step; Local POD off."""
    delta = 1.0
    batches = given_batches(SIZES)
    chain = run_chain(in_tmp / "r", "reminder", SIZES, batches, [*OFF, f"delta={delta}"])
    network: Any = copy.deepcopy(chain[0].opened)
    kept = torch.empty(0)
    cuts: list[bool] = []
    for t, done in enumerate(chain):
        if not t:
            parameters = list(network.parameters())
            found = fit(network, parameters, batches[0], 0.05, lambda z, b: cross_entropy(z, b["labels"]))
        else:
            old = copy.deepcopy(network).eval().requires_grad_(False)
            first = sum(SIZES[: t - 1]) if t > 1 else 0
            rows = straight_prototypes(old, batches[t - 1], first, sum(SIZES[:t]))
            kept = torch.cat([kept[:first].to(rows), rows])
            torch.testing.assert_close(done.state["prototypes"], kept, rtol=1e-9, atol=1e-12)
            thresholds = EntropyThresholds(sum(SIZES[:t]), sum(SIZES[: t + 1]))
            for b in batches[t]:
                thresholds.update(old(b["images"]).logits, b["labels"])
            tau = thresholds.thresholds().double()
            network = copy.deepcopy(done.opened)
            network.load_state_dict({**network.state_dict(), **old.state_dict()})
            seen: list[Tensor] = []
            network.head.register_forward_hook(lambda module, given, out, to=seen: to.append(out))
            with torch.no_grad():
                head, new = network.classifier.heads[0], network.classifier.heads[t]
                bias = head.bias[0] - math.log(SIZES[t] + 1)
                new.weight[:] = head.weight[:1]
                new.bias[:] = bias
                head.bias[0] = bias

            losses = losses_of(old, tau, seen, kept, delta, cuts)
            found = fit(network, list(network.parameters()), batches[t], 0.02, losses)
        for got, want in zip(done.losses, found, strict=True):
            assert got == pytest.approx(want, rel=1e-7, abs=1e-12)
        for name, weight in done.weights.items():
            torch.testing.assert_close(
                weight, network.state_dict()[name], rtol=1e-6, atol=1e-9, msg=f"{t} {name}"
            )
    assert any(cuts)


def test_step_0_is_that_of_ft() -> None:
    """Shared; what REMINDER needs of it is made by the next step."""
    plan = plan_of(["ft", "plop", "reminder"])
    firsts = {chain.keys[0] for chain in plan.chains}
    assert len(plan.chains) == 3
    assert len(firsts) == 1


def test_a_batch_without_a_new_class_has_no_distillation() -> None:
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    labels = torch.tensor([[[0, 1], [255, 2]]])
    prototypes = torch.zeros(4, 5)
    loss = class_similarity_distillation(z, torch.randn(1, 3, 2, 2), labels, prototypes, torch.randn(3, 5))
    assert loss == 0
    assert not torch.isnan(loss)


def test_a_class_without_a_pixel_has_a_row_of_zeros() -> None:
    features = torch.randn(2, 3, 4, 4)
    labels = torch.full((2, 8, 8), 255)
    labels[0, :2] = 3
    found = batch_prototypes(features, labels, 2, 5)
    assert found[[0, 1, 2, 4]].abs().sum() == 0
    assert found[3].abs().min() > 0
    mean = PrototypeMean(2, 5)
    mean.update(features, labels)
    mean.update(features, torch.full((2, 8, 8), 255))  # a batch that does not show it does not count
    assert torch.equal(mean.mean(), found)
