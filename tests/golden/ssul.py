"""Adapters of the family ssul; those of the exemplar memory are in ssul_memory.py."""

import random

import numpy as np
import torch
from golden_common import confusion, leaf, t, toy_dataset
from PIL import Image

from bench.data import augment
from bench.method.batch import normalise
from bench.method.schedule import learning_rate
from bench.models.classifier import ConvHeads
from bench.protocol.labels import INDEX, View, lookup_table, rule
from bench.protocol.protocol import Step
from bench.score import iou as scores
from methods.ssul import (
    bce_ignore_multi_head,
    encode_labels_unknown,
    predict_merge_unknown,
    sigmoid_pseudo_labels,
    unknown_weight_transfer,
)


def bce(x, p):
    z = leaf(x["logits"])
    weight = t(x["weight"]) if "weight" in x else None
    loss = bce_ignore_multi_head(z, t(x["labels"]).long(), weight, p["reduction"], p["ignore_index"])
    loss.sum().backward()
    return {"loss": loss.detach(), "grad_logits": z.grad}


def pseudo_labels(x, p):
    before = t(x["labels"])
    after = sigmoid_pseudo_labels(
        t(x["prev_logits"]).float(), before, p["first_foreground_minus_one"], p["threshold"], p["activation"]
    )
    return {"pseudo_labels": after, "n_changed": (after != before).sum()}


def encode_labels(x, p):
    order, new = p["class_order"], [c for c in p["step_classes"] if c]
    old = [c for c in p["previous_classes"] if c]
    dataset = toy_dataset(p["dataset"], max(order) + 1)
    step = Step(p["step"], tuple(new), tuple(old))
    use = {"train": "train", "val": "validation", "test": "test", "memory": "memory"}[p["split"]]
    view = View(0, INDEX, 0, 255) if use == "memory" else rule("ssul").view(use, dataset)
    labels = t(lookup_table(view, dataset, order, step)[x["ground_truth"]]).long()
    salient = (
        t(x["saliency"]) > 0
        if use == "train" and p["dataset"] == "voc"
        else torch.ones_like(labels, dtype=torch.bool)
    )
    if use == "train" and p["unknown"]:
        labels = encode_labels_unknown(labels, salient)
    used = (
        x["saliency"]
        if use == "train" and p["dataset"] == "voc"
        else salient.numpy().astype(x["saliency"].dtype)
    )
    return {"labels": labels, "saliency_used": used}


def weight_transfer(x, p):
    classifier = ConvHeads(p["width"], p["head_sizes"])
    prefix = "classifier.head."
    old = {k.removeprefix(f"old.{prefix}"): t(v) for k, v in x.items() if k.startswith(f"old.{prefix}")}
    fresh = {k.removeprefix(f"fresh.{prefix}"): t(v) for k, v in x.items() if k.startswith(f"fresh.{prefix}")}
    classifier.heads.load_state_dict({**fresh, **old})
    unknown_weight_transfer(classifier)
    return {f"new.{prefix}{k}": v for k, v in classifier.heads.state_dict().items()}


def predict(x, p):
    classes, scores = predict_merge_unknown(t(x["logits"]), p["unknown"])
    return {"prediction": classes, "scores": scores}


def lr_schedule(x, p):
    policy = {"poly": "poly", "warm_poly": "warm-poly"}[p["policy"]]
    warmup = p["warmup_iters"] or 0
    settings = p["max_iters"], policy, p["power"], p["min_lr"] or 0.0, warmup, p["warmup_factor"]
    return {
        "lrs": np.array(
            [[learning_rate(float(base), i, *settings) for base in x["base_lrs"]] for i in range(p["steps"])]
        )
    }


def confusion_metrics(x, p):
    matrix = confusion(x["targets"], x["predictions"], p["n_classes"])
    iou, mean = scores.mean_iou(matrix, "zero")
    accuracy = scores.accuracies(matrix, "zero")
    return {
        "confusion": matrix, "class_iou": iou, "mean_iou": mean,
        "class_acc": accuracy.per_class, "mean_acc": accuracy.mean,
        "overall_acc": accuracy.overall, "freqw_acc": accuracy.frequency_weighted_iou,
    }  # fmt: skip


def tensors(maps):
    image, *others = augment.to_arrays(maps)
    return [normalise(torch.from_numpy(image.copy())[None])[0], *(m.astype(np.int64) for m in others)]


def train_augment(x, p):
    maps = [Image.fromarray(x[k]) for k in ("image", "labels", "saliency")]
    image, labels, saliency = tensors(
        augment.scale_crop(maps, p["crop_size"], random.Random(p["python_random_seed"]), p["scale_range"])
    )
    return {"image_out": image, "labels_out": labels, "saliency_out": saliency}


def eval_crop(x, p):
    image, labels = tensors(
        augment.center_crop([Image.fromarray(x[k]) for k in ("image", "labels")], p["crop_size"])
    )
    return {"image_out": image, "labels_out": labels}


ADAPTERS = {
    "bce_ignore_multi_head": bce,
    "sigmoid_pseudo_labels": pseudo_labels,
    "encode_labels_unknown": encode_labels,
    "unknown_weight_transfer": weight_transfer,
    "predict_merge_unknown": predict,
    "lr_schedule": lr_schedule,
    "confusion_metrics": confusion_metrics,
    "train_augment_scale_crop_flip": train_augment,
    "eval_resize_center_crop": eval_crop,
}
