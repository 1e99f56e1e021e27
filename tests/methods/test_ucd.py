"""UCD: a chain of three steps against the same chain computed straight on; the corrected pairs; what it
refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chains import cross_entropy, fit, given_batches, mib_losses, run_chain
from plans import plan_of
from torch import Tensor, nn

from bench.errors import UserError
from bench.method.registry import method
from bench.method.resolve import resolve
from bench.protocol.file import load
from bench.testing.tensors import TensorBatch
from methods.ucd import contrastive_loss, contrastive_pairs

SIZES = (3, 2, 1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def straight_contrast(features: Tensor, before: Any, labels: Tensor, corrected: bool) -> Tensor:
    """Anchor by anchor, contrast by contrast.

    Source: spec/ucd.md section 1.
    """
    b, _, h, w = features.shape
    n_old = before.small_logits.shape[1]
    p = before.small_logits.softmax(1)
    if corrected:
        step = labels.shape[-1] // w
        y = labels[:, ::step, ::step]
        y = torch.where((y >= n_old) & (y != 255), y, 0)
    else:
        y = F.interpolate(labels[:, None].double(), (h, w), mode="bilinear")[:, 0].trunc().long()
        y = torch.where(y > 20, 0, y)
    least = n_old if corrected else min(v for v in y.flatten().tolist() if v)
    anchors, older = [], []
    for i in range(b):
        for r in range(h):
            for c in range(w):
                own = int(y[i, r, c])
                label = own or int(before.small_logits[i, :, r, c].argmax())
                if label:
                    anchors.append((label, F.normalize(features[i, :, r, c], dim=0), p[i, :, r, c]))
                if label and not own:
                    old = F.normalize(before.features[i, :, r, c], dim=0)
                    older.append((label, old, p[i, :, r, c]))
    contrasts = [(label, u.detach(), q) for label, u, q in anchors] + older
    found = []
    for i, (label, u, q) in enumerate(anchors):
        s = torch.stack([u @ v for _, v, _ in contrasts]) / 0.07
        top = s.max().detach()
        against = sum(
            (s[j] - top * corrected).exp() for j, (other, _, _) in enumerate(contrasts) if other != label
        )
        terms = []
        for j, (other, _, q2) in enumerate(contrasts):
            if other == label and j != i:
                share = 1.0 if label >= least else q @ q2
                terms.append(share * (s[j] - top - ((s[j] - top).exp() + against).log()))
        if terms:
            found.append(-torch.stack(terms).mean())
    return torch.stack(found).mean()


def losses_of(
    old: nn.Module, seen: list[Tensor], corrected: bool
) -> Callable[[Tensor, TensorBatch], dict[str, Tensor]]:
    """MiB's losses and the contrast of one batch; `seen` holds the network's features, the last batch's
    last."""

    def losses(z: Tensor, b: TensorBatch) -> dict[str, Tensor]:
        before, y = old(b["images"]), b["labels"]
        contrast = straight_contrast(seen[-1], before, y, corrected)
        return mib_losses(z, before.logits, y, 10.0) | {"contrast": 0.01 * contrast}

    return losses


@pytest.mark.parametrize("name", ["ucd", "ucd@corrected"])
def test_three_steps_are_those_of_the_specification(in_tmp: Path, name: str) -> None:
    """Losses of every iteration, weights after each step."""
    batches = given_batches(SIZES)
    chain = run_chain(in_tmp / "r", name, SIZES, batches)
    network: Any = copy.deepcopy(chain[0].opened)
    for t, done in enumerate(chain):
        if not t:
            parameters = list(network.parameters())
            found = fit(network, parameters, batches[0], 0.05, lambda z, b: cross_entropy(z, b["labels"]))
        else:
            old = copy.deepcopy(network).eval().requires_grad_(False)
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
            learn = [p for n, p in network.named_parameters() if not n.startswith("classifier.heads.0.")]
            found = fit(network, learn, batches[t], 0.02, losses_of(old, seen, name != "ucd"))
        for got, want in zip(done.losses, found, strict=True):
            assert got == pytest.approx(want, rel=1e-7)
        for key, weight in done.weights.items():
            torch.testing.assert_close(
                weight, network.state_dict()[key], rtol=1e-6, atol=1e-9, msg=f"{t} {key}"
            )


def test_at_a_border_the_published_code_sees_other_classes() -> None:
    """Between 0 and 16 the amounts 8 and 4 lie; to the nearest there is nothing between."""
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[:, :, 1:] = 16
    maps, logits = torch.randn(1, 3, 2, 2), torch.zeros(1, 16, 2, 2)
    published, corrected = (
        contrastive_pairs(maps, maps, logits, labels, how) for how in ("as-published", "corrected")
    )
    assert published is not None
    assert corrected is not None
    assert set(published.anchor_labels.tolist()) == {8, 16}
    assert set(corrected.anchor_labels.tolist()) == {16}
    assert contrastive_loss(published) != contrastive_loss(corrected, pairing="corrected")


def test_nothing_new_and_nothing_alike() -> None:
    maps, logits = torch.randn(1, 3, 2, 2, requires_grad=True), torch.zeros(1, 3, 2, 2)
    assert contrastive_pairs(maps, maps, logits, torch.zeros(1, 4, 4, dtype=torch.long)) is None
    labels = torch.tensor([[[3, 0], [0, 0]]])
    alone = contrastive_pairs(maps, maps, logits, labels)
    assert alone is not None
    loss = contrastive_loss(alone)
    assert loss == 0


def test_labels_above_20() -> None:
    """The released code makes them background; the variant does not."""
    for name, refused in (("ucd", True), ("ucd@corrected", False)):
        config = resolve(method(name), load("ade-100-50"), "published").config
        cls = method(name).cls
        if refused:
            with pytest.raises(UserError, match="ucd@corrected"):
                cls.check(config, load("ade-100-50"))
        else:
            cls.check(config, load("ade-100-50"))
    cls.check(resolve(method("ucd"), load("voc-15-1"), "published").config, load("voc-15-1"))


def test_step_0_is_that_of_ft_and_the_title_says_what_it_is() -> None:
    plan = plan_of(["ft", "mib", "ucd", "ucd@corrected"])
    assert len({chain.keys[0] for chain in plan.chains}) == 1
    assert len({chain.keys[1] for chain in plan.chains}) == 4
    assert method("ucd").title == "UCD (reconstruction)"
