"""Adapters of the family plop."""

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from golden_common import confusion, leaf, presence, t, toy_dataset

from bench.data import augment
from bench.method.schedule import learning_rate
from bench.models.classifier import LinearClassifier, align_classifier_norm
from bench.models.heads import global_pooling
from bench.models.network import upsample
from bench.protocol.labels import lookup_table, rule
from bench.protocol.protocol import Protocol
from bench.score import iou as scores
from methods.mib import background_classifier_init
from methods.plop import (
    EntropyThresholds,
    classification_loss,
    fold_new_logits,
    local_pod_distillation,
    local_pod_embedding,
    pixel_entropy,
    pseudo_label,
)


def with_cotangent(function, inp, out, *params):
    def adapter(x, p):
        z = leaf(x[inp])
        y = function(z, *(p[name] for name in params))
        (y * t(x["cotangent"])).sum().backward()
        return {out: y.detach(), f"grad_{inp}": z.grad}

    return adapter


def class_factor(p):
    return math.sqrt((p["n_old_classes"] + p["n_new_classes"]) / p["n_new_classes"])


def pod_distillation(x, p):
    n = p["n_layers"]
    old = [t(x[f"old_{i}"]) for i in range(n)]
    new = [leaf(x[f"new_{i}"]) for i in range(n)]
    folded, factors = list(new), [p["pod_factor"]] * n
    if p["last_layer_is_logits"]:
        options = (p["pod_options"] or {}).get("switch", {}).get("after", {})
        folded[-1] = fold_new_logits(new[-1], p["n_old_classes"], options.get("extra_channels", "sum"))
        if p["pod_logits_factor"] is not None:
            factors[-1] = p["pod_logits_factor"]
    loss = local_pod_distillation(
        old, folded, factors, class_factor(p) if p["use_class_count_schedule"] else 1.0, p["spp_scales"]
    )
    loss.backward()
    return {"loss": loss.detach(), **{f"grad_new_{i}": new[i].grad for i in range(n)}}


def entropy_thresholds(x, p):
    found = EntropyThresholds(
        p["n_old_classes"], p["n_old_classes"] + p["n_new_classes"], p["base_threshold"], p["mode"]
    )
    out: dict[str, Any] = {"max_value": found.max_value}
    for k in range(p["n_batches"]):
        found.update(t(x["logits_old"][k]), t(x["labels"][k]).long())
        out[f"thresholds_after_{k + 1}"] = found.thresholds()
        out[f"histogram_after_{k + 1}"] = found.histogram.clone()
    return out


def entropy_pseudo_label(x, p):
    targets, accepted, factor = pseudo_label(
        t(x["logits_old"]), t(x["labels"]), t(x["thresholds"]), p["n_old_classes"]
    )
    return {"targets": targets, "valid_mask": accepted.to(torch.uint8), "adaptive_factor": factor}


def plop_classification_loss(x, p):
    z = leaf(x["logits"])
    targets, _, factor = pseudo_label(
        t(x["logits_old"]), t(x["labels"]), t(x["thresholds"]), p["n_old_classes"]
    )
    loss = classification_loss(z, targets, factor)
    loss.backward()
    return {"loss": loss.detach(), "grad_logits": z.grad}


def plop_total_loss(x, p):
    n, n_old = p["n_feature_maps"], p["n_old_classes"]
    size = (p["image_size"], p["image_size"])
    small, small_old = leaf(x["logits_small"]), t(x["logits_small_old"])
    new = [leaf(x[f"features_{i}"]) for i in range(n)]
    old = [t(x[f"features_old_{i}"]) for i in range(n)]
    targets, _, factor = pseudo_label(upsample(small_old, size), t(x["labels"]), t(x["thresholds"]), n_old)
    ce = classification_loss(upsample(small, size), targets, factor)
    factors = [p["pod_factor"]] * n + [p["pod_logits_factor"]]
    pod = local_pod_distillation(
        [*old, small_old], [*new, fold_new_logits(small, n_old)], factors, class_factor(p), p["spp_scales"]
    )
    (ce + pod).backward()
    return {
        "ce_loss": ce.detach(), "pod_loss": pod.detach(), "loss": (ce + pod).detach(),
        "adaptive_factor": factor, "targets": targets,
        "grad_logits_small": small.grad, **{f"grad_features_{i}": new[i].grad for i in range(n)},
    }  # fmt: skip


def background_init(x, p):
    weight, bias, sizes = t(x["weight"]), t(x["bias"]), p["classes_per_step"]
    classifier = LinearClassifier(weight.shape[1], sizes)
    with torch.no_grad():
        for head, w, b in zip(classifier.heads, weight.split(sizes), bias.split(sizes), strict=True):
            head.weight.copy_(w[:, :, None, None])
            head.bias.copy_(b)
    background_classifier_init(classifier)
    return {
        "weight_after": torch.cat([head.weight.detach().flatten(1) for head in classifier.heads]),
        "bias_after": torch.cat([head.bias.detach() for head in classifier.heads]),
    }


def align(x, p):
    return {"weight_after": align_classifier_norm(t(x["weight"]), p["classes_per_step"], p["align_type"])}


def poly_lr(x, p):
    base, total, power = p["base_lr"], p["max_iters"], p["power"]
    main = [learning_rate(base, i, total, "poly", power) for i in range(total)]
    ahead = [learning_rate(base, i + 1, total, "poly", power) for i in range(total)]
    return {"lr_main": np.array(main), "lr_pretuning": np.array(ahead)}


def dataset_view(x, p):
    old, new = [c for c in p["labels_old"] if c], [c for c in p["labels"] if c]
    n = 1 + max(int(c) for c in [*np.unique(x["raw_labels"]), *old, *new] if c != 255)
    dataset = toy_dataset(p["dataset"], n)
    groups = (tuple(old), tuple(new)) if old else (tuple(new),)
    protocol = Protocol("toy", dataset, "overlapped" if p["overlap"] else "disjoint", groups)
    use = {"train": "train", "val": "validation", "test": "test"}[p["split"]]
    if use != "train":
        protocol = replace(protocol, setting="overlapped")
    index = len(groups) - 1
    chosen = rule("plop").images(use, protocol, index, presence(x["raw_labels"]))
    table = lookup_table(rule("plop").view(use, dataset), dataset, protocol.order, protocol.step(index))
    return {"selected": np.array(chosen, np.int64), "mapped_labels": table[x["raw_labels"][chosen]]}


def random_resized_crop_params(x, p):
    rng = random.Random(p["seed"])
    return {
        "top_left_height_width": np.array(
            [augment.draw_crop(int(w), int(h), rng, p["scale"], p["ratio"]) for w, h in x["image_wh"]]
        )
    }


def aspp_global_pooling(x, p):
    return {"pooled": global_pooling(t(x["features"]), p["training"], p["pooling_size"])}


def segmentation_scores(x, p):
    matrix = confusion(x["labels"], x["predictions"], p["n_classes"])
    iou, mean = scores.mean_iou(matrix)
    accuracy = scores.accuracies(matrix)
    return {"class_iou": iou, "mean_iou": mean, "overall_acc": accuracy.overall, "mean_acc": accuracy.mean}


ADAPTERS = {
    "pixel_entropy": with_cotangent(pixel_entropy, "probabilities", "entropy"),
    "local_pod_embedding": with_cotangent(local_pod_embedding, "features", "embedding", "spp_scales"),
    "local_pod_distillation": pod_distillation,
    "entropy_thresholds": entropy_thresholds,
    "entropy_pseudo_label": entropy_pseudo_label,
    "plop_classification_loss": plop_classification_loss,
    "plop_total_loss": plop_total_loss,
    "background_classifier_init": background_init,
    "align_classifier_norm": align,
    "poly_lr": poly_lr,
    "incremental_dataset_view": dataset_view,
    "random_resized_crop_params": random_resized_crop_params,
    "aspp_global_pooling": aspp_global_pooling,
    "segmentation_scores": segmentation_scores,
}
