"""STAR: a chain of three steps against the specification computed straight on; its oddities, what it does
where the released code ends, its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chains import given_batches, run_chain
from jobs import train
from torch import Tensor

from bench.method.registry import method
from bench.method.step_data import StepData
from bench.models.build import build_network
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.store.results import Store
from methods import star

Toy = Callable[..., Path]
SIZES = (3, 2, 1)
WEIGHT = 8.0
"""Of positive pixels, so that the old network claims some."""
AT = slice(4, None, 8)
"""Middle of a cell of 8 pixels: "tiny" has output stride 8."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def normals(per_class: list[int], depth: int, wide: int) -> tuple[Tensor, Tensor]:
    """What the global generator draws next, class by class: directions [V, D], lengths [V, wide]."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for n in per_class:
        for to, channels in zip(found, (depth, wide), strict=True):
            to.append(torch.randn(1, channels, n, 1, dtype=torch.float64)[0, :, :, 0].T)
    return torch.cat(found[0]), torch.cat(found[1])


def no(logits: Tensor) -> Tensor:
    """log(1 + e^z): the loss of a negative."""
    return torch.logaddexp(logits, torch.zeros_like(logits))


def bce(z: Tensor, target: Tensor, weight: float) -> Tensor:
    return torch.where(target, weight * no(-z), no(z)).mean((0, 2, 3))


def straight_prototypes(
    network: Any, batches: list[Any], classes: list[int], kept: list[Tensor] | None, own: bool
) -> list[Tensor]:
    """Directions, norms and spreads of all classes, point by point.

    Source: spec/star.md section 6.
    """
    points: dict[int, list[Tensor]] = {c: [] for c in classes}
    with torch.no_grad():
        for batch in batches:
            f = network.eval()(batch["images"]).features
            at = batch["labels"][:, AT, AT]
            for b, i, j in torch.cartesian_prod(*map(torch.arange, at.shape)).tolist():
                if at[b, i, j].item() in points:
                    points[at[b, i, j].item()].append(f[b, :, i, j])
    vectors = [torch.stack(points[c]) for c in classes]
    units = [v / v.norm(dim=1, keepdim=True) for v in vectors]
    directions = torch.stack([u.sum(0) / u.sum(0).norm() for u in units])
    norms = torch.stack([torch.stack([v.norm(dim=1).mean() for v in vectors]),
                         torch.stack([v.norm(dim=1).std() for v in vectors])])  # fmt: skip
    every = directions if kept is None else torch.cat([kept[0], directions])
    spreads = torch.stack(
        [(u - (directions if own else every)[n]).square().mean(0).sqrt() for n, u in enumerate(units)]
    )
    if kept is None:
        return [directions, norms, spreads]
    return [every, torch.cat([kept[1], norms], 1), torch.cat([kept[2], spreads])]


@pytest.mark.parametrize(("name", "setting"), [("star", "overlapped"), ("star@corrected", "disjoint")])
def test_three_steps_are_those_of_the_specification(in_tmp: Path, name: str, setting: str) -> None:
    """Losses of every iteration, weights and statistics after each step, what is handed on.

    Source: spec/star.md sections 4 to 6.
    """
    batches, randoms = given_batches(SIZES, iterations=4), []
    chain = run_chain(
        in_tmp / "r",
        name,
        SIZES,
        batches,
        [f"pos_weight={WEIGHT}", "lr=0.002"],
        watch=lambda s: randoms.append(began(s)),
        setting=setting,
    )
    corrected = name != "star"
    network: Any = None
    kept: list[Tensor] | None = None
    counted = torch.zeros(0)
    replayed = claimed_labelled = claimed_free = 0
    for t, done in enumerate(chain):
        n_old, there = sum(SIZES[:t]) - 1 if t else 0, sum(SIZES[: t + 1]) - 1
        classes, own = list(range(n_old + 1, there + 1)), batches[t]
        old: Any = copy.deepcopy(network).eval() if t else None
        network = copy.deepcopy(done.opened)
        if t:
            network.load_state_dict({**network.state_dict(), **old.state_dict()})
        on_points = torch.cat([b["labels"][:, AT, AT].flatten() for b in own])
        new = torch.tensor([(on_points == c).sum() for c in (0, *classes)], dtype=torch.float64)
        if t == 0:
            counted = new
        else:
            claims = []
            for b in own:
                with torch.no_grad():
                    best, which = old(b["images"]).logits.max(1)
                claims.append(((best > 0.5) * (which + 1))[:, AT, AT].flatten())
            q = torch.cat(claims)[on_points == 0]
            claimed = torch.tensor([(q == k).sum() for k in range(n_old + 1)], dtype=torch.float64)
            if setting == "overlapped":
                background = counted[0] * (1 - 0.01 * len(classes))
                lacking, share, kept_counts = counted[1:] - claimed[1:], 0.5, counted[1:]
            else:
                background, lacking, share = counted[0], counted[1:], 0.0
                kept_counts = counted[1:] + claimed[1:]
            per_class = [max(0, int(n / len(own))) for n in lacking.tolist()]
            ratio = max(0.0, (background / claimed[0]).item() - share)
            counted = torch.cat([((1 - share) * claimed[0] + background)[None], kept_counts, new[1:]])
        heads = f"classifier.heads.{t}."
        learn = {n: p for n, p in network.named_parameters() if not (t and is_norm(network, n))}
        groups = [{"params": [p for n, p in learn.items() if kind(n, heads) == k]} for k in range(3)]
        lr, rates = (0.05, (1.0, 1.0, 1.0)) if t == 0 else (0.002, (0.1, 1.0, 10.0))
        network.train(t == 0)
        sgd = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
        if t:
            torch.set_rng_state(randoms[t]())
        found = []
        for i, batch in enumerate(own):
            out, y = network(batch["images"]), batch["labels"]
            target = torch.stack([y == c for c in classes], 1)
            terms = {"bce": bce(out.logits[:, n_old:], target, WEIGHT)}
            if t:
                assert kept is not None
                with torch.no_grad():
                    before = old(batch["images"])
                best, which = before.logits.max(1)
                q = (best > 0.5) * (which + 1)
                claimed_free += int(((y == 0) & (q > 0)).sum())
                claimed_labelled += int(((y != 0) & (q > 0)).sum())
                free = ((y == 0) & (q == 0))[:, AT, AT]
                f, head = out.features, network.classifier.heads[t]
                g, h = normals(per_class, f.shape[1], 1 if corrected else f.shape[1])
                of = torch.tensor([k for k, n in enumerate(per_class) for _ in range(n)], dtype=torch.long)
                v = (kept[0][of] + kept[2][of] * g) * (kept[1][1, of, None] * h + kept[1][0, of, None])
                replayed += len(v)
                w, b = head.weight[:, :, 0, 0], head.bias
                points = free.numel()
                w_rep, w_bg = len(v) / points, ratio * free.sum().item() / points
                total = terms["bce"]
                if len(v):
                    total = total + w_rep * no(v @ w.T + b).mean(0)
                if free.any():
                    total = total + w_bg * no(f.permute(0, 2, 3, 1)[free] @ w.T + b).mean(0)
                terms["bce"] = total / (1 + w_rep + w_bg)
                region = torch.nn.functional.interpolate(
                    ((y == 0) & (q > 0))[:, None].double(), size=f.shape[2:], mode="bilinear"
                )
                apart = (f - before.features) ** 2
                terms["pkd"] = 5 * (region * apart).sum() / (f.shape[1] * region.sum())
                if not region.any():
                    terms["pkd"] = 0 * f.sum()
                soft = torch.nn.functional.interpolate(target.double(), size=f.shape[2:], mode="bilinear")
                unit = f / f.norm(dim=1, keepdim=True)
                centres = [(soft[:, n, None] * unit).sum((0, 2, 3)) for n in range(len(classes))]
                centres = [c / c.norm().clamp(min=1e-12) for c in centres]
                near = [1 / torch.stack([(c - p).norm() for p in kept[0]]).min() for c in centres]
                terms["separation"] = 0.05 * torch.stack(near).mean()
            terms["bce"] = terms["bce"].sum()
            for group, rate in zip(sgd.param_groups, rates, strict=True):
                group["lr"] = lr * rate * (1 - i / len(own)) ** 0.9
            sgd.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            sgd.step()
            found.append({name: term.item() for name, term in terms.items()})
        for got, want in zip(done.losses, found, strict=True):
            assert got == pytest.approx(want, rel=1e-7, abs=1e-12)
        for key, weight in done.weights.items():
            torch.testing.assert_close(
                weight, network.state_dict()[key], rtol=1e-6, atol=1e-9, msg=f"{t} {key}"
            )
        kept = straight_prototypes(network, own, classes, kept, corrected)
        for key, value in zip(("directions", "norms", "spreads"), kept, strict=True):
            torch.testing.assert_close(done.state[key], value, rtol=1e-6, atol=1e-9, msg=f"{t} {key}")
        assert torch.equal(done.state["counts"], counted)
    assert min(replayed, claimed_free, claimed_labelled) > 0


def began(session: Any) -> Any:
    """Where torch's generator stands at the first iteration of a session not yet trained."""
    stands: list[Tensor] = []
    losses = session.method.later_losses

    def remembered(*given: Any) -> Any:
        stands.append(torch.get_rng_state())
        return losses(*given)

    session.method.later_losses = remembered
    return lambda: stands[0]


def kind(name: str, newest: str) -> int:
    """0 the body, 2 the newest classifier, 1 the rest."""
    return 0 if name.startswith("body.") else 2 if name.startswith(newest) else 1


def is_norm(network: Any, name: str) -> bool:
    from bench.models.abn import norm_layers

    return any(p is network.get_parameter(name) for layer in norm_layers(network) for p in layer.parameters())


def test_labels_meet_features_in_the_middle_of_a_cell() -> None:
    rows = torch.arange(512).expand(1, 512, 512)
    assert star.on_grid(rows, (32, 32))[0, 0].tolist() == list(range(8, 512, 16))
    assert star.on_grid(rows.mT, (32, 64))[0, :, 0].tolist() == list(range(8, 512, 16))


def test_an_old_class_claims_by_its_logit_and_is_predicted_by_its_score() -> None:
    logits = torch.tensor([0.4, 0.6, -0.1]).view(1, 1, 1, 3)
    assert star.old_predictions(logits).tolist() == [[[0, 1, 0]]]
    assert star.predict_above_half(logits).tolist() == [[[1, 1, 0]]]


def test_a_length_for_each_channel_turns_a_feature_and_one_for_all_does_not() -> None:
    kept = star.Prototypes(torch.eye(2, 4), torch.tensor([[5.0, 7.0], [2.0, 2.0]]), torch.full((2, 4), 0.1))
    g, h = torch.randn(6, 4), torch.randn(6, 4)
    as_published, one = (star.replayed_features(kept, [2, 4], g, lengths) for lengths in (h, h[:, :1]))
    aimed = kept.directions[[0, 0, 1, 1, 1, 1]] + 0.1 * g
    similarity = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(similarity(one, aimed).abs(), torch.ones(6))
    assert similarity(as_published, aimed).abs().min() < 0.999


def sums(
    old: star.Prototypes | None, classes: list[int], about: star.Spreads, f: Tensor, y: Tensor
) -> star.Prototypes:
    found = star.PrototypeSums(classes, old, about)
    found.first_pass(f, y)
    found.end_first_pass()
    found.second_pass(f, y)
    return found.prototypes()


def test_the_released_spread_of_a_later_class_is_about_another() -> None:
    f, y = torch.randn(2, 8, 4, 4) * 0.1, torch.ones(2, 4, 4, dtype=torch.long)
    f[:, 0] += 3.0
    first = sums(None, [1], "as-published", f, y)
    later, own = (sums(first, [2], about, -f, 2 * y) for about in ("as-published", "own"))
    assert later.spreads[1, 0] > 1.9
    assert own.spreads[1, 0] < 0.1
    assert torch.equal(later.directions, own.directions)


def test_a_class_that_no_point_shows_is_neither_replayed_nor_avoided() -> None:
    f, y = torch.randn(2, 8, 4, 4), torch.ones(2, 4, 4, dtype=torch.long)
    found = sums(None, [1, 2], "as-published", f, y)
    assert all(part.isfinite().all() for part in (found.directions, found.norms, found.spreads))
    counts = star.counts(y, [1, 2])
    assert counts.tolist() == [0, 32, 0]
    plan = star.replay_plan(counts, torch.zeros(3), torch.ones(2), 4, True)
    assert plan.per_iteration.tolist() == [8, 0]
    assert plan.background == 0
    alone = star.separation(f, 3 * y, found.directions, 2, 1)
    assert torch.equal(alone, star.separation(f, 3 * y, found.directions[:1], 2, 1))
    nobody = star.separation(f.requires_grad_(), 3 * y, torch.zeros(2, 8), 2, 1)
    assert nobody == 0
    nobody.backward()


def test_without_a_claimed_pixel_nothing_is_distilled() -> None:
    f = torch.randn(2, 8, 4, 4, requires_grad=True)
    loss = star.feature_distillation(f, torch.zeros(2, 8, 4, 4), torch.zeros(2, 1, 32, 32))
    loss.backward()
    assert loss == 0
    assert f.grad is not None
    assert not f.grad.any()


def test_names_in_memory_are_right_unless_the_released_slip_is_asked_for() -> None:
    logits = torch.full((1, 3, 1, 3), -9.0)
    logits[0, 0, 0, 0] = logits[0, 2, 0, 1] = 9.0
    labels = torch.tensor([[[0, 0, 5]]])
    assert star.candidates_pseudo_labels(logits, labels, 0.9).tolist() == [[[1, 3, 5]]]
    assert star.candidates_pseudo_labels(logits, labels, 0.9, "as-published").tolist() == [[[0, 2, 5]]]


def test_memory_is_labelled_by_the_trained_teacher() -> None:
    """From the third step on; in the second there is nothing to complete."""
    name = method("star@m")
    for index, shown in ((1, [[]]), (2, [[1]])):
        built: Any = name.build(name.config())
        built.step = load("voc-15-1").step(index)
        logits = torch.full((1, built.n_old, 2, 2), -9.0)
        logits[:, 0] = 9.0
        batch: Any = SimpleNamespace(
            labels=torch.zeros(1, 2, 2, dtype=torch.long), teacher=SimpleNamespace(logits=logits)
        )
        assert built.classes_of_candidates(batch) == shown


def test_each_pass_is_over_other_crops_of_all_images_in_full_precision(
    toy: Toy, in_tmp: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes that count, two for the prototypes; those in memory are among the images.

    Source: spec/star.md sections 6 and 7.
    """
    settings = [*quick, "epochs=2", "memory_size=4", "precision=bf16"]
    plan = make_plan([str(toy())], ["star@m"], overrides=settings)
    passes: list[tuple[int, int, int]] = []
    seen: list[torch.dtype] = []
    stream, count = StepData.stream, star.PrototypeSums.first_pass

    def streamed(data: StepData, epoch: int = 0, whole: bool = False, images: Any = None) -> Any:
        if not whole:  # not the look through candidates for the memory
            passes.append((data.step.index, epoch, len(images) - len(data.train)))
        return stream(data, epoch, whole, images)

    def first_pass(self: star.PrototypeSums, features: Tensor, labels: Tensor) -> None:
        seen.append(features.dtype)
        count(self, features, labels)

    monkeypatch.setattr(StepData, "stream", streamed)
    monkeypatch.setattr(star.PrototypeSums, "first_pass", first_pass)
    store = Store("results")
    for key in plan.chains[0].keys[:2]:
        train(plan, store, key)
    assert passes == [
        *((0, epoch, 0) for epoch in (0, 2, 3)),  # step 0 has 2 epochs as well, and nothing to replay
        *((1, epoch, 4) for epoch in (0, 1, 2, 3)),
    ]
    assert set(seen) == {torch.float32}


def test_the_classifier_has_no_background() -> None:
    network: Any = build_network("small", [2, 3], "foreground")
    assert network(torch.zeros(2, 3, 32, 32)).logits.shape[1] == 5
    built = method("star").build(method("star").config())
    assert built.heads([3, 2, 1]) == [2, 2, 1]
