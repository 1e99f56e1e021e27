"""BARM: three steps through the engine against the specification written down in plain torch, what its two
oddities change, and what a plan makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden.steps import Steps, TinyNetwork
from jobs import images_of, train_all
from torch import Tensor, nn

from bench.errors import UserError
from bench.method.registry import method
from bench.method.resolve import resolve
from bench.plan.make import footnotes_of, make_plan
from bench.plan.plan import Plan
from bench.protocol.file import load
from bench.store.results import Store
from bench.train.session import Session
from methods import barm
from methods.barm.heads import ResidualHeads

Toy = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# ---- three steps against the specification -----------------------------------------------------------------

SIZES, SIDE, BATCH, EPOCHS, ITERATIONS = (3, 2, 1), 16, 3, 2, 3
SETTINGS: dict[str, Any] = {
    "precision": "fp64", "crop": SIDE, "batch_size": BATCH, "epochs": EPOCHS, "first_epochs": EPOCHS,
    "label_rule": "ssul", "weight_decay": 0.02, "min_lr": 0.004, "lr": 0.1, "first_lr": 0.3,
    "body_lr": 0.1, "first_body_lr": 0.5, "aspp_lr": 0.6, "old_lr": 0.3, "threshold": 0.3,
    "residual_background": 3.0, "residual_new": 1.5, "features": 2.5, "scores": 0.7,
}  # fmt: skip
Weights = dict[str, Tensor]


def dropped(x: Tensor) -> Tensor:
    """Every third element dropped, the others scaled."""
    kept = (torch.arange(x.numel()).view(x.shape) % 3 > 0).to(x.dtype)
    return x * kept * 1.5


class Dropout(nn.Module):
    """A dropout that draws nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return dropped(x) if self.training else x


class Body(nn.Module):
    """A convolution of stride 2."""

    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = torch.relu(self.norm(self.conv(images)))
        return x, [x]


class Head(nn.Module):
    """A 1x1 convolution and dropout, in the place of ASPP."""

    out_channels = 5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 5, 1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.dropout = Dropout()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(torch.relu(self.norm(self.conv(x))))
        return out


def passed(
    w: Weights, images: Tensor, branches: int, dropout: bool, learn_norms: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Features of each branch, and what its 1x1 convolution makes of them."""

    def normed(x: Tensor, name: str) -> Tensor:
        statistics = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        scaled = F.batch_norm(x, *statistics, w[f"{name}.weight"], w[f"{name}.bias"], learn_norms, 0.1, 1e-5)
        return scaled.clamp(min=0)

    x = normed(F.conv2d(images, w["body.conv.weight"], stride=2, padding=1), "body.norm")
    x = normed(F.conv2d(x, w["head.conv.weight"]), "head.norm")
    if dropout:
        x = dropped(x)
    features, scores = [], []
    for i in range(branches):
        at = f"classifier.heads.{i}"
        features.append(normed(F.conv2d(x, w[f"{at}.0.weight"], padding=1), f"{at}.1"))
        scores.append(F.conv2d(features[-1], w[f"{at}.3.weight"], w[f"{at}.3.bias"]))
    return features, scores


def evaluated(scores: Sequence[Tensor]) -> Tensor:
    """Logits of a test: background of step 0 and what later residuals take from it, then all classes."""
    background = scores[0][:, :1]
    for later in scores[1:]:
        background = background + torch.minimum(later[:, :1], torch.zeros(()).double())
    return torch.cat([background, *(s[:, 1:] for s in scores)], 1)


def upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Over all channels, the mean over valid pixels."""
    hot = (labels[:, None] == torch.arange(logits.shape[1]).view(1, -1, 1, 1)).double()
    each = -(hot * F.logsigmoid(logits) + (1 - hot) * F.logsigmoid(-logits)).sum(1)
    return each[labels != 255].sum() / (labels != 255).sum()


class Seen:
    """What must have occurred for the comparison to say much."""

    def __init__(self) -> None:
        self.pseudo = self.background = 0
        self.signs = set[bool]()


def straight_terms(w: Weights, old: Weights, batch: dict[str, Tensor], t: int, seen: Seen) -> Weights:
    """Weighted terms of one batch, as the specification writes them."""
    images, y = batch["images"], batch["labels"].long()
    features, scores = passed(w, images, t + 1, dropout=True, learn_norms=not t)
    if not t:
        return {"bce": bce(upsampled(scores[0]), y)}
    with torch.no_grad():
        features_old, scores_old = passed(old, images, t, dropout=False, learn_norms=False)
        z_old = upsampled(evaluated(scores_old))
        m, c = torch.sigmoid(z_old).max(1)
        accepted = (y == 0) & (c > 0) & (m >= SETTINGS["threshold"])
        labels = torch.where(accepted, c, y)
    zero = torch.zeros(()).double()
    background = scores[0][:, :1].detach() + scores[t][:, :1]
    for i in range(1, t):
        background = background + torch.minimum(scores[i][:, :1], zero).detach()
    old_classes = [s[:, 1:].detach() for s in scores[:t]]
    logits = upsampled(torch.cat([background, *old_classes, scores[t][:, 1:]], 1))
    small = y[:, ::2, ::2]
    pos, neg = ((small != 0) & (small != 255)).double(), (small == 0).double()
    b = scores[t][:, 0]
    s = torch.sigmoid(b)
    seen.pseudo += int(accepted.sum())
    seen.background += int(((y == 0) & ~accepted).sum())
    seen.signs |= set((b > 0).flatten().tolist())
    held = zero
    for new, former in zip(features, features_old, strict=False):
        held = held + ((neg[:, None] * (new - former)) ** 2).mean()
    distilled = zero
    for new, former in zip(scores, scores_old, strict=False):
        target = torch.sigmoid(former)
        each = -(target * F.logsigmoid(new) + (1 - target) * F.logsigmoid(-new))
        distilled = distilled + each.mean((0, 2, 3)).sum()
    return {
        "bce": bce(logits, labels),
        "residual_background": 3.0 * (neg * torch.maximum(1 - 2 * s, zero)).sum() / neg.sum(),
        "features": 2.5 * held,
        "scores": 0.7 * distilled,
        "residual_new": 1.5 * (pos * torch.log1p(b.exp())).sum() / (pos.sum() + 1e-8),
    }


def rate(name: str, t: int) -> float:
    """At the start of a step."""
    if not t:
        return 0.3 * 0.5 if name.startswith("body") else 0.3
    if name.startswith(f"classifier.heads.{t}."):
        return 0.1
    return 0.1 * {"body": 0.1, "head": 0.6, "classifier": 0.3}[name.partition(".")[0]]


def straight_step(
    w: Weights, old: Weights, batches: Sequence[dict[str, Tensor]], t: int, seen: Seen
) -> list[dict[str, float]]:
    """Train one step, weights in place; the terms of each iteration."""
    norms = {name.rpartition(".")[0] for name in w if name.endswith("running_mean")}
    trained = [name for name in w if "running" not in name and not (t and name.rpartition(".")[0] in norms)]
    momentum: Weights = {}
    told = []
    for k, batch in enumerate(batches):
        for name in trained:
            w[name].requires_grad_()
        terms = straight_terms(w, old, batch, t, seen)
        gradients = torch.autograd.grad(sum(terms.values(), torch.zeros(())), [w[name] for name in trained])
        told.append({name: term.item() for name, term in terms.items()})
        for name, gradient in zip(trained, gradients, strict=True):
            w[name] = w[name].detach()
            g = gradient + 0.02 * w[name]
            momentum[name] = 0.9 * momentum[name] + g if k else g
            lr = max(rate(name, t) * (1 - k / len(batches)) ** 0.9, 0.004)
            w[name] = w[name] - lr * (g + 0.9 * momentum[name])
    return told


def state_of(session: Session) -> Weights:
    """Weights and statistics of the network, as they are now."""
    state = session.method.network.state_dict()
    return {k: v.detach().clone().contiguous() for k, v in state.items() if "num_batches" not in k}


def batches_of(t: int) -> list[dict[str, Tensor]]:
    """Batches of one step, with its labels: background, the step's classes, void."""
    drawn = torch.Generator().manual_seed(t)
    first = sum(SIZES[:t])
    found = []
    for _ in range(EPOCHS * ITERATIONS):
        images = torch.randn(BATCH, 3, SIDE, SIDE, generator=drawn, dtype=torch.float64)
        labels = torch.randint(0 if t else 1, SIZES[t] + 2, (BATCH, 4, 4), generator=drawn)
        labels = torch.where(labels > SIZES[t], 0, labels + first - 1).clamp(min=0)
        labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
        labels[:, 5:7, 3:9] = 255
        found.append({"images": images, "labels": labels})
    return found


def test_three_steps_are_those_of_the_specification() -> None:
    seen = Seen()
    test = torch.randint(0, 256, (5, SIDE, SIDE, 3), dtype=torch.uint8), torch.randint(0, 6, (5, SIDE, SIDE))
    w: Weights = {}
    with Steps("barm", SIZES, [BATCH * ITERATIONS] * 3, TinyNetwork(Body, Head, "residual-heads")) as steps:
        for t in range(len(SIZES)):
            batches = batches_of(t)
            with steps.open(t, SETTINGS, batches, test) as session:
                begun, old = state_of(session), {k: v.clone() for k, v in w.items()}
                w |= {k: v for k, v in begun.items() if k not in w}
                if t:
                    at, first = f"classifier.heads.{t}", "classifier.heads.0"
                    for name in ("0.weight", "1.weight", "1.bias"):
                        w[f"{at}.{name}"] = w[f"{first}.{name}"].clone()
                    w[f"{at}.1.running_mean"], w[f"{at}.1.running_var"] = torch.zeros(5), torch.ones(5)
                    w = {k: v.double() for k, v in w.items()}
                told = straight_step(w, old, batches, t, seen)
                session.train()
                found = state_of(session)
                counts = steps.publish(session)
                images = session.trainer.batch({"images": test[0], "labels": test[1]}).images
            assert found.keys() == w.keys()
            for name, value in w.items():
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=f"{t} {name}")
            logged = steps.logged()
            assert len(logged) == len(told)
            for line, expected in zip(logged, told, strict=True):
                assert line == pytest.approx(expected, rel=1e-9)
            _, scores = passed(w, images, t + 1, dropout=False, learn_norms=False)
            predicted = upsampled(torch.sigmoid(evaluated(scores))).argmax(1)
            matrix = torch.zeros(6, sum(SIZES[: t + 1]), dtype=torch.int64)
            matrix.index_put_((test[1], predicted), torch.ones(()).long(), accumulate=True)
            assert counts.total().tolist() == matrix.tolist()
    assert seen.pseudo > 50
    assert seen.background > 50
    assert seen.signs == {False, True}


# ---- parts -------------------------------------------------------------------------------------------------


def test_without_background_the_residual_has_no_loss_there_and_a_gradient() -> None:
    residual = torch.randn(2, 3, 3, requires_grad=True)
    labels = torch.full((2, 3, 3), 4)
    loss = barm.residual_on_background(residual, labels) + barm.residual_on_new_classes(residual, labels)
    loss.backward()
    torch.testing.assert_close(loss, F.softplus(residual).mean())
    assert residual.grad is not None
    assert residual.grad.isfinite().all()


def heads_of(*sizes: int) -> ResidualHeads:
    heads = ResidualHeads(4, sizes)
    for head in heads.heads:
        head[1].running_mean.normal_()
        head[1].running_var.uniform_(1, 2)
    return heads


def test_statistics_of_a_new_branch_are_fresh_or_the_first_ones() -> None:
    mean, variance = torch.randn(4), torch.rand(4)
    for copied in (False, True):
        heads = heads_of(3, 2)
        heads.heads[0][1].running_mean.copy_(mean)
        heads.heads[0][1].running_var.copy_(variance)
        heads.grow(3)
        barm.branch_transfer(heads, copied)
        first, newest = heads.heads[0], heads.heads[-1]
        assert torch.equal(first[0].weight, newest[0].weight)
        assert newest[1].running_mean.tolist() == (mean if copied else torch.zeros(4)).tolist()
        assert newest[1].running_var.tolist() == (variance if copied else torch.ones(4)).tolist()
        assert newest[3].weight.shape[0] == 3


# ---- plans and runs ----------------------------------------------------------------------------------------


def keys(plan: Plan) -> list[tuple[str, ...]]:
    return [chain.keys for chain in plan.chains]


def test_step_0_does_not_depend_on_what_comes_later(toy: Toy, quick: list[str]) -> None:
    protocol = str(toy(then=2))
    as_it_is, corrected = keys(make_plan([protocol], ["barm", "barm@corrected"], overrides=quick))
    assert as_it_is[0] == corrected[0]
    assert as_it_is[1] != corrected[1]
    for setting in ("threshold=0.5", "features=1", "old_lr=0.2", "aspp_lr=0.5", "half_of_the_data=true"):
        (changed,) = keys(make_plan([protocol], ["barm"], overrides=[*quick, f"barm.{setting}"]))
        assert changed[0] == as_it_is[0]
        assert changed[1] != as_it_is[1]


def test_one_half_of_the_images_is_trained_on_again_and_again(toy: Toy, quick: list[str]) -> None:
    protocol = toy(images=36, then=2)
    names = images_of(protocol)
    halves = []
    for run, seed in enumerate((0, 0, 1)):
        plan = make_plan([str(protocol)], ["barm"], seeds=[seed], overrides=[*quick, "half_of_the_data=true"])
        built: Any = train_all(plan, Store(f"r{run}")).method
        halves.append(list(built.training.names))
        assert built.length("training").images == len(halves[-1])
    assert len(halves[0]) == -(-len(names[1]) // 2)
    assert set(halves[0]) < set(names[1])
    assert halves[0] == halves[1] != halves[2]


def test_a_half_that_fills_no_batch_is_refused(toy: Toy, quick: list[str]) -> None:
    protocol = str(toy(then=2))
    settings = [*quick, "batch_size=10", "first_batch_size=4", "half_of_the_data=true"]
    with pytest.raises(UserError, match="training images are fewer than batch_size = 10"):
        make_plan([protocol], ["barm"], overrides=settings)


def test_a_transformer_is_refused(toy: Toy, quick: list[str]) -> None:
    with pytest.raises(UserError, match="network = 'small-vit': has no features of convolutions"):
        make_plan([str(toy(then=2))], ["barm"], overrides=[*quick, "network=small-vit"])


def test_validations_are_epochs_or_every_fifth() -> None:
    spec = method("barm")
    built = spec.build(spec.config(first_epochs=50, epochs=20).at(0))
    assert [built.validation_interval(50 * n) for n in (598, 101, 100, 20)] == [598, 101, 500, 100]


def test_the_published_row_says_what_it_is() -> None:
    protocol = load("voc-15-1")
    notes = [
        footnotes_of(s, resolve(s, protocol, "published"), protocol)
        for s in map(method, ("barm", "barm@corrected"))
    ]
    for said in ("half of their images", "mean 0 and variance 1"):
        assert [any(said in note for note in row) for row in notes] == [True, False]
    assert all(any(note.startswith("step 0 hands on the iterate") for note in row) for row in notes)
