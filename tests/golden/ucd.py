"""Adapters of the family ucd: the two functions of the released code that can be executed."""

import torch
from golden_common import leaf, t

from methods.ucd import attention, contrastive_loss, contrastive_pairs


def attended(x, p):
    z = leaf(x["x"])
    out = attention(z)
    out.backward(t(x["cotangent"]))
    return {"out": out.detach(), "grad_x": z.grad}


def contrastive(x, p):
    f = leaf(x["features"])
    pairs = contrastive_pairs(f, t(x["features_old"]), t(x["logits_old"]), t(x["labels"]))
    assert pairs is not None
    loss = contrastive_loss(pairs, p["temperature"])
    return {
        "anchor_labels": pairs.anchor_labels, "contrast_labels": pairs.contrast_labels, "joint": pairs.joint,
        "loss": loss.detach(), "grad_features": torch.autograd.grad(loss, f)[0],
    }  # fmt: skip


ADAPTERS = {"ucd_attention": attended, "ucd_contrastive": contrastive}
