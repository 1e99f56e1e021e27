"""Adapters of the family eir: EIR and its base DKD."""

import random
from typing import Any

import numpy as np
import torch
from golden_common import confusion, leaf, t
from PIL import Image

from bench.data import augment
from bench.method import replay
from bench.method.batch import normalise
from bench.method.schedule import learning_rate
from bench.models.classifier import AuxiliaryClassifier
from bench.models.network import Output
from bench.score import iou as scores
from bench.score.conventions import convention
from methods import dkd, eir
from methods.ssul import sigmoid_pseudo_labels


def soft_bce(x, p):
    z = leaf(x["logits"])
    loss = eir.soft_multi_label_bce(z, t(x["targets"]), p["reduction"])
    loss.sum().backward()
    return {"loss": loss.detach(), "grad_logits": z.grad}


def region_distillation(x, p):
    z = leaf(x["logits"])
    mask = t(x["mask"]) if "mask" in x else None
    loss = eir.region_distillation(z, t(x["prev_logits"]), mask, "as_published", p["temperature_scale"])
    loss.backward()
    return {"loss": loss.detach(), "grad_logits": z.grad}


def paste_instance(x, p):
    image, targets = t(x["image"]).float(), t(x["targets"]).float()
    instance = t(x["instance_image"]).float(), t(x["instance_labels"])
    eir.paste_instance(
        image,
        targets,
        *instance,
        p["instance_class"],
        float(x["lam"]),
        p["region_top_left"],
        p["region_size"],
    )
    return {"image_out": image, "targets_out": targets}


def background_regions(x, p):
    corners, zeros = eir.background_regions(t(x["foreground_mask"])[None], p["region_size"], p["top"])
    return {"top_left": corners[0], "zeros": zeros[0]}


def pseudo_labels(x, p):
    return {"pseudo_labels": sigmoid_pseudo_labels(t(x["prev_logits"]), t(x["labels"]), 0, p["threshold"])}


def single_component_filter(x, p):
    return {"keep": np.array([eir.is_single_component(m, p["ignore_index"]) for m in x["labels"]])}


def instance_memory(x, p):
    drawn, sizes = [], []
    for step, old in sorted(p["old_classes"].items(), key=lambda item: int(item[0])):
        found = eir.single_instances(t(x[f"labels_step{int(step) - 1}"]).long())
        names = p["image_names"][f"step{int(step) - 1}"]
        candidates = [
            *drawn,
            *(replay.Record(name, c) for name, c in zip(names, found, strict=True) if c is not None),
        ]
        drawn = replay.class_balanced_draw(candidates, old, p["mem_size"], p["numpy_seed"])
        sizes.append(len(drawn))
    return {"memory_sizes": np.array(sizes)}


def replayed_instance(x, p):
    labels = eir.stored_only(x["ground_truth"], p["stored_labels"])
    image = normalise(t(x["image"])[None])
    cut = eir.cut_out(image, t(labels)[None])
    return {
        "image_out": cut[0],
        "labels_out": labels.astype(np.int64),
        "paste_image": image[0],
        "paste_labels": labels,
    }


def predict(x, p):
    return {"prediction": dkd.predict_foreground_threshold(t(x["logits"]), p["threshold"])}


def confusion_metrics(x, p):
    matrix = confusion(x["targets"], x["predictions"], p["n_classes"])
    iou, _ = scores.mean_iou(matrix, "zero", convention("eir").epsilon)
    both = p["old_classes"] + p["new_classes"]
    old, new, overall = (scores.mean(iou[classes]) for classes in (p["old_classes"], p["new_classes"], both))
    percent: dict[str, Any] = {
        "by_class": iou,
        "overall": overall,
        "old": old,
        "new": new,
        "harmonic": scores.harmonic_mean(old, new),
    }
    return {"confusion": matrix, **{name: np.multiply(100, value) for name, value in percent.items()}}


def lr_schedule(x, p):
    policy = {"poly": "poly", "warm_poly": "warm-poly"}[p["policy"]]
    warmup = (p["warmup_fraction"] or 0) * p["max_iters"]
    settings = p["max_iters"], policy, p["power"], 0.0, warmup, p["warmup_factor"]
    return {
        "lrs": np.array(
            [
                [learning_rate(float(base), i, *settings) for base in x["base_lrs"]]
                for i in range(p["max_iters"])
            ]
        )
    }


def train_augment(x, p):
    maps = [Image.fromarray(x[k]) for k in ("image", "labels")]
    rng = random.Random(p["python_random_seed"])
    image, labels = augment.to_arrays(
        augment.random_resized_crop(maps, p["crop_size"], rng, p["area_scale"], p["ratio"])
    )
    return {"image_out": normalise(t(image)[None])[0], "labels_out": labels}


def classifier(x, prefix, sizes):
    found = AuxiliaryClassifier(next(iter(x.values())).shape[1], [1, *sizes])
    found.heads.load_state_dict(
        {name.removeprefix(prefix): t(value) for name, value in x.items() if name.startswith(prefix)}
    )
    return found


def auxiliary_and_class_heads(x, p):
    features = leaf(x["features"])
    logits, parts = classifier(x, "param.cls.", p["classes"])(features)
    logits.backward(t(x["grad_output"]))
    return {
        "logits": logits.detach(),
        **{name: value.detach() for name, value in parts.items()},
        "grad_features": features.grad,
    }


def auxiliary_head_transfer(x, p):
    heads = classifier(x, "old.cls.", p["classes"])
    dkd.auxiliary_head_transfer(heads)
    return {f"new.cls.{name}": value for name, value in heads.heads.state_dict().items()}


def dkd_incremental_loss(x, p):
    def output(prefix, leaf):
        logits, positive, negative = (
            t(x[prefix + name]).requires_grad_(leaf) for name in ("logits", "positive", "negative")
        )
        return Output(logits, logits, [], logits, logits, {"positive": positive, "negative": negative})

    new, old = output("", True), output("prev_", False) if "prev_logits" in x else None
    terms = dkd.incremental_terms(new, old, t(x["labels"]), p["n_new_classes"], p["pos_weight"])
    w = p["weights"]
    weights = {
        "bce": w["mbce"],
        "auxiliary": w["ac"],
        "kd": w["kd"],
        "kd_positive": w["dkd_pos"],
        "kd_negative": w["dkd_neg"],
    }
    loss = torch.stack(list(dkd.weighted_sums(terms, weights).values())).sum()
    loss.backward()
    names = {
        "bce": "bce_per_class",
        "auxiliary": "auxiliary",
        "kd": "kd_per_class",
        "kd_positive": "dkd_positive",
        "kd_negative": "dkd_negative",
    }
    gradients = {
        "grad_logits": new.logits.grad,
        **{f"grad_{name}": value.grad for name, value in new.extra.items()},
    }
    return {
        "loss": loss.detach(),
        **{names[name]: term.detach() for name, term in terms.items()},
        **gradients,
    }


ADAPTERS = {
    "soft_multi_label_bce": soft_bce,
    "region_distillation_as_published": region_distillation,
    "paste_instance": paste_instance,
    "background_regions": background_regions,
    "pseudo_labels_and_potential_classes": pseudo_labels,
    "single_component_filter": single_component_filter,
    "instance_memory": instance_memory,
    "replayed_instance": replayed_instance,
    "predict_foreground_threshold": predict,
    "confusion_metrics_percent": confusion_metrics,
    "lr_schedule_dkd": lr_schedule,
    "train_augment_random_resized_crop": train_augment,
    "auxiliary_and_class_heads": auxiliary_and_class_heads,
    "auxiliary_head_transfer": auxiliary_head_transfer,
    "dkd_incremental_loss": dkd_incremental_loss,
}
