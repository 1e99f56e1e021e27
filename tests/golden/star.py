"""Adapters of the family star: replayed prototypes, and the losses around them."""

import numpy as np
import torch
from golden_common import leaf, t

from bench.method import replay
from bench.method.schedule import learning_rate
from methods import star


def differentiated(loss, x):
    loss.backward()
    return x.grad


def weighted_bce(x, p):
    z = leaf(x["logits_new"])
    by_class = star.new_class_bce(z, t(x["labels"]), p["n_old_foreground"], p["pos_weight"])
    gradient = differentiated(by_class.sum(), z)
    return {"loss_per_class": by_class.detach(), "loss": by_class.sum().detach(), "grad_logits_new": gradient}


def feature_distillation(x, p):
    f = leaf(x["features"])
    loss = star.feature_distillation(f, t(x["features_old"]), t(x["region"]))
    return {"loss": loss.detach(), "grad_features": differentiated(loss, f)}


def separation(x, p):
    f = leaf(x["features"])
    old = t(x["prototypes_old"])
    loss = star.separation(f, t(x["labels"]), old, p["n_old_foreground"], p["n_new"])
    return {"loss": loss.detach(), "grad_features": differentiated(loss, f)}


def claimed(x, n_old, size):
    labels, q = t(x["labels"]), star.old_predictions(t(x["logits_old"]))
    at = torch.where(star.on_grid(labels, size) == 0, star.on_grid(q, size), -1)
    return labels, q, star.counts(at, range(1, n_old + 1)), at == 0


def old_predictions(x, p):
    size = [n // 16 for n in x["labels"].shape[1:]]
    labels, q, points, _ = claimed(x, x["logits_old"].shape[1], size)
    return {"predictions": q, "region": ((labels == 0) & (q > 0)).byte(), "counts_predicted": points}


def replay_plan(x, p):
    before, predicted, new = (t(x[f"counts_{name}"]) for name in ("old", "predicted", "new"))
    plan = star.replay_plan(before, predicted, new, p["iterations"], p["setting"] == "overlap")
    return {
        "per_iteration": plan.per_iteration.int(),
        "extra_background_ratio": np.float32(plan.background),
        "counts_after": plan.counts,
    }


def kept(x):
    return star.Prototypes(t(x["prototypes_old"]), t(x["norms_old"]), t(x["noise_old"]))


def prototypes(x, p):
    classes = range(p["n_old_foreground"] + 1, p["n_old_foreground"] + p["n_new"] + 1)
    sums = star.PrototypeSums(classes, kept(x) if p["step"] else None)
    features, labels = t(x["features"]), t(x["labels"])
    for f, y in zip(features, labels, strict=True):
        sums.first_pass(f, y)
    sums.end_first_pass()
    for f, y in zip(features, labels, strict=True):
        sums.second_pass(f, y)
    found = sums.prototypes()
    points = sum(star.counts(star.on_grid(y, features.shape[3:]), classes) for y in labels)
    return {
        "counts": points,
        "prototypes": found.directions,
        "norms": found.norms,
        "noise": found.spreads,
    }


def iteration(x, p):
    f, weight, bias = (leaf(x[name]) for name in ("features", "weight_1", "bias_1"))
    n_old = len(x["weight_0"])
    labels, q, _, background = claimed(x, n_old, f.shape[2:])
    small = torch.nn.functional.conv2d(f, weight[:, :, None, None], bias)
    logits = upsampled(small, labels)
    drawn = star.replayed_features(
        kept(x), x["per_iteration"].tolist(), t(x["gaussian_direction"]), t(x["gaussian_norm"])
    )
    total = star.with_negatives(
        star.new_class_bce(logits, labels, n_old, p["pos_weight"]),
        drawn @ weight.T + bias,
        small.permute(0, 2, 3, 1)[background],
        p["extra_background_ratio"],
        background.numel(),
    )
    region = ((labels == 0) & (q > 0)).unsqueeze(1).float()
    terms = (
        total.sum(),
        star.feature_distillation(f, t(x["features_old"]), region),
        star.separation(f, labels, t(x["prototypes_old"]), n_old, p["n_new"]),
    )
    weighted = [w * term for w, term in zip(p["weights"], terms, strict=True)]
    loss = torch.stack(weighted).sum()
    loss.backward()
    named = zip(("loss_mbce", "loss_pkd", "loss_cont"), weighted, strict=True)
    return {
        **{name: term.detach() for name, term in named},
        "loss": loss.detach(),
        "grad_features": f.grad,
        "grad_weight_1": weight.grad,
        "grad_bias_1": bias.grad,
    }


def upsampled(small, labels):
    size = labels.shape[1:]
    return torch.nn.functional.interpolate(small, size=size, mode="bilinear", align_corners=False)


def predict(x, p):
    return {"prediction": star.predict_above_half(t(x["logits"]))}


def memory_draw(x, p):
    labels = t(x["labels"])
    if p["step"] > 1:
        labels = star.candidates_pseudo_labels(t(x["logits"]), labels, p["threshold"], "as-published")
    void = (labels == 255).flatten(1).any(1).tolist()  # the released code lists it among the classes
    shown = [
        [*classes, *([255] if v else [])]
        for classes, v in zip(replay.shown_classes(labels), void, strict=True)
    ]
    candidates = [
        *(replay.Record(*record) for record in p["previous"]),
        *(replay.Record(name, classes) for name, classes in zip(p["names"], shown, strict=True)),
    ]
    drawn = replay.class_balanced_draw(candidates, p["old_classes"], p["size"], p["seed"])
    return {
        "drawn": np.array([record.name for record in drawn]),
        "label_lists": np.array([" ".join(map(str, record.labels)) for record in drawn]),
    }


def lr_schedule(x, p):
    base, total = float(x["base_lr"]), p["max_iters"]
    factors = (1, 10, 10, 100) if p["later_step"] else (1, 10, 10)
    policy = "warm-poly" if p["warmup"] else "poly"
    rates = [
        [learning_rate(base * factor, i, total, policy, warmup=0.2 * total) for factor in factors]
        for i in range(total)
    ]
    return {"lrs": np.array(rates)}


ADAPTERS = {
    "star_weighted_bce": weighted_bce,
    "star_feature_distillation": feature_distillation,
    "star_separation": separation,
    "star_old_predictions": old_predictions,
    "star_replay_plan": replay_plan,
    "star_prototypes": prototypes,
    "star_iteration": iteration,
    "star_predict": predict,
    "star_memory_draw": memory_draw,
    "star_lr_schedule": lr_schedule,
}
