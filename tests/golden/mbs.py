"""Adapters of the family mbs."""

import random

import torch
from golden_common import confusion, leaf, t
from PIL import Image

from bench.data import augment
from bench.data.dataset import load_dataset
from bench.method.batch import normalise
from bench.models.network import Output
from bench.models.vit import MaskTransformer, VisionTransformer, mask_norm
from bench.protocol.labels import lookup_table, rule
from bench.protocol.protocol import Step
from bench.score import iou as scores
from methods import mbs
from methods.lwf import knowledge_distillation


def gradients(loss, **leaves):
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return {f"grad_{name}": g for name, g in zip(leaves, found, strict=True)}


def selective_pseudo_labels(x, p):
    return {
        "labels_out": mbs.selective_pseudo_labels(
            t(x["prev_logits"]), t(x["labels"]), p["threshold"], p["ignore_index"]
        )
    }


def feature_distillation_weight_map(x, p):
    return {
        "weights": mbs.feature_distillation_weight_map(
            t(x["prev_masks"]), t(x["labels"]), p["step_classes"], p["ignore_index"]
        )
    }


def adaptive_feature_distillation(x, p):
    features, weights = leaf(x["features"]), t(x["weights"]) if "weights" in x else None
    loss = mbs.adaptive_feature_distillation(features, t(x["prev_features"]), weights, p["reduction"])
    return {"loss": loss.detach(), **gradients(loss, features=features)}


def class_token_orthogonality(x, p):
    tokens = leaf(x["class_tokens"])
    loss = mbs.class_token_orthogonality(
        tokens.expand(p["batch_size"], -1, -1), p["step_classes"][0], p["weight"]
    )
    return {"loss": loss.detach(), **gradients(loss, class_tokens=tokens)}


def label_guided_output_distillation(x, p):
    logits = leaf(x["logits"])
    loss = mbs.label_guided_output_distillation(
        logits, t(x["prev_logits"]), t(x["labels"]), p["temperature_scale"]
    )
    return {"loss": loss.detach(), **gradients(loss, logits=logits)}


def output_distillation(x, p):
    logits = leaf(x["logits"])
    loss = knowledge_distillation(logits, t(x["prev_logits"]), p["temperature_scale"])
    return {"loss": loss.detach(), **gradients(loss, logits=logits)}


def mbs_incremental_loss(x, p):
    leaves = {name: leaf(x[name]) for name in ("logits", "patches", "class_features", "class_tokens")}
    logits, *extra = leaves.values()
    none = torch.empty(0)
    new = Output(
        logits,
        none,
        [],
        none,
        none,
        dict(zip(("patches", "class_features", "class_tokens"), extra, strict=True)),
    )
    old_extra = {"patches": t(x["prev_patches"]), "class_features": t(x["prev_class_features"])}
    old = Output(t(x["prev_logits"]), t(x["prev_masks"]), [], none, none, old_extra)
    weight, threshold = p["output_distillation_weight"], p["threshold"]
    terms, targets = mbs.mbs_incremental_loss(
        new, old, t(x["labels"]), p["step_classes"], weight, threshold, p["ignore_index"]
    )
    loss = torch.stack(list(terms.values())).sum()  # as the engine sums them
    return {
        "loss": loss.detach(),
        "segmentation_loss": terms["ce"].detach(),
        "feature_loss": (terms["patches"] + terms["tokens"]).detach(),
        "output_and_orthogonal_loss": (terms["output"] + terms["orthogonality"]).detach(),
        "pseudo_labels": targets,
        **gradients(loss, **leaves),
    }


def mask_layer_norm(x, p):
    masks, weight, bias = leaf(x["masks"]), leaf(x["weight"]), leaf(x["bias"])
    normed = mask_norm(masks, weight, bias, p["eps"])
    return {
        "normed": normed.detach(),
        **gradients(normed * t(x["grad_output"]), masks=masks, weight=weight, bias=bias),
    }


def parameters(x):
    return {name.removeprefix("param."): t(value) for name, value in x.items() if name.startswith("param.")}


HEAD_NAMES = {"cls_emb": "tokens", "mask_norm.weight": "scale", "mask_norm.bias": "shift"}
"""Of a head's parameters in the vectors, with the number of the head behind."""


def to_ours(name):
    kind, _, head = name.rpartition(".")
    return f"heads.{head}.{HEAD_NAMES[kind]}" if kind in HEAD_NAMES else name


def mask_transformer(x, p):
    module = MaskTransformer(
        p["d_encoder"], p["head_sizes"], p["n_heads"], p["d_model"], p["n_layers"], p["d_ff"], p["drop_path"]
    )
    module.load_state_dict({to_ours(name): value for name, value in parameters(x).items()})
    tokens = leaf(x["tokens"])
    features = tokens.transpose(1, 2).unflatten(2, (p["grid"], p["grid"]))
    masks, extra = module.train(p["mode"] == "train")(features)
    return {
        "masks": masks.detach(),
        **{name: v.detach() for name, v in extra.items()},
        **gradients(masks * t(x["grad_output"]), tokens=tokens),
    }


def vit_encoder(x, p):
    module = VisionTransformer(
        p["image_size"], p["patch_size"], p["d_model"], p["n_layers"], p["n_heads"], p["d_ff"]
    )
    module.load_state_dict(parameters(x))
    return {"tokens": module.tokens(t(x["image"]))[-1].detach()}


def background_token_transfer(x, p):
    *old, new = p["head_sizes"]
    module = MaskTransformer(p["d_model"], old, n_heads=1)
    module.load_state_dict(
        {to_ours(name.removeprefix("old.decoder.")): t(value) for name, value in x.items()}, strict=False
    )
    module.grow(new)
    mbs.background_token_transfer(module)
    names = {ours: theirs for theirs, ours in HEAD_NAMES.items()}
    state = {}
    for index, head in enumerate(module.heads):
        state.update(
            {f"new.decoder.{names[name]}.{index}": value.detach() for name, value in head.named_parameters()}
        )
    return state


def encode_labels_mbs(x, p):
    order, new = p["class_order"], [c for c in p["step_classes"] if c]
    step = Step(p["step"], tuple(new), tuple(order[1 : order.index(new[0])]))
    dataset = load_dataset(p["dataset"])
    view = rule("mbs").view({"val": "validation"}.get(p["split"], p["split"]), dataset)
    return {"labels": lookup_table(view, dataset, order, step)[x["ground_truth"]]}


def confusion_metrics_nonzero_mean(x, p):
    matrix = confusion(x["targets"], x["predictions"], p["n_classes"])
    mean = scores.mean_iou(matrix, "nonzero")[1]
    return {"confusion": matrix, "class_iou": scores.class_iou(matrix), "mean_iou": mean}


def train_augment_resize_scale_crop_flip(x, p):
    maps, rng = (
        [Image.fromarray(x["image"]), Image.fromarray(x["labels"])],
        random.Random(p["python_random_seed"]),
    )
    image, labels = augment.to_arrays(augment.resize_scale_crop(maps, p["crop_size"], rng, p["scale_range"]))
    return {"image_out": normalise(t(image)[None])[0], "labels_out": labels}


ADAPTERS = {
    function.__name__: function
    for function in (
        selective_pseudo_labels,
        feature_distillation_weight_map,
        adaptive_feature_distillation,
        class_token_orthogonality,
        label_guided_output_distillation,
        output_distillation,
        mbs_incremental_loss,
        mask_layer_norm,
        mask_transformer,
        vit_encoder,
        background_token_transfer,
        encode_labels_mbs,
        confusion_metrics_nonzero_mean,
        train_augment_resize_scale_crop_flip,
    )
}
