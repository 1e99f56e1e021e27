"""Adapters of the family mib: the data views, the transforms, the metric."""

import random
from itertools import chain

import numpy as np
import torch
from golden_common import confusion, presence, toy_dataset
from PIL import Image

from bench.data import augment
from bench.method.batch import normalise
from bench.protocol.images import bits, image_partition
from bench.protocol.labels import lookup_table, rule
from bench.protocol.protocol import Protocol
from bench.score import iou as scores


def ade_image_partition(x, p):
    shows = [bits((np.flatnonzero(row[1:]) + 1).tolist()) for row in x["presence"]]
    return {
        "step_of_image": np.array(
            image_partition(shows, p["classes_per_step"], p["ratio_weight"], p["rarity_weight"])
        )
    }


def incremental_dataset(family):
    def adapter(x, p):
        groups = [[c for c in group if c] for group in p["classes_per_step"]]
        name = "plop-ignore-background" if p.get("ignore_test_bg") else family
        ids = np.unique([*chain(*groups), *np.unique(x["train_masks"]), *np.unique(x["val_masks"])])
        dataset = toy_dataset(p["dataset"], 1 + int(ids[ids != 255].max()))
        protocol = Protocol(
            "toy", dataset, "overlapped" if p["overlap"] else "disjoint", tuple(map(tuple, groups))
        )
        out = {}
        for use, key in (("train", "train"), ("validation", "val"), ("test", "test")):
            masks = x["train_masks"] if use == "train" else x["val_masks"]
            chosen = rule(name).images(use, protocol, p["step"], presence(masks))
            table = lookup_table(
                rule(name).view(use, dataset), dataset, protocol.order, protocol.step(p["step"])
            )
            out[f"{key}_indices"] = np.array(chosen, np.int64)
            out[f"{key}_labels"] = table[masks[chosen]]
        return out

    return adapter


def as_tensors(maps, p):
    image, label = augment.to_arrays(maps)
    return normalise(torch.from_numpy(image.copy())[None], p["mean"], p["std"])[0], label.astype(np.int64)


def maps_of(x, label="label"):
    return [Image.fromarray(x["image"]), Image.fromarray(x[label])]


def train_transform(x, p):
    rng = random.Random(p["python_seed"])
    image, label = as_tensors(
        augment.random_resized_crop(maps_of(x), p["size"], rng, p["scale"], p["ratio"]), p
    )
    h, w = x["label"].shape
    boxes = [augment.draw_crop(w, h, random.Random(seed), p["scale"], p["ratio"]) for seed in p["box_seeds"]]
    return {"out_image": image, "out_label": label, "boxes_top_left_h_w": np.array(boxes)}


def eval_transform(x, p):
    image, label = as_tensors(augment.center_crop(maps_of(x), p["size"]), p)
    return {"out_image": image, "out_label": label}


def segmentation_metrics(x, p):
    matrix = confusion(x["labels"], x["predictions"], p["n_classes"])
    iou, mean = scores.mean_iou(matrix)
    accuracy = scores.accuracies(matrix)
    return {
        "confusion_matrix": matrix, "class_iou": iou, "mean_iou": mean,
        "class_acc": accuracy.per_class, "mean_acc": accuracy.mean,
        "overall_acc": accuracy.overall, "freqw_acc": accuracy.frequency_weighted_iou,
    }  # fmt: skip


ADAPTERS = {
    "ade_image_partition": ade_image_partition,
    **{
        f"incremental_dataset_{family}": incremental_dataset(family)
        for family in ("mib", "plop", "ssul", "mbs")
    },
    "train_transform": train_transform,
    "eval_transform": eval_transform,
    "segmentation_metrics": segmentation_metrics,
}
