"""Adapters of the family reminder: prototypes, and the distillation weighted by them."""

import torch
from golden_common import leaf, t

from methods.reminder import PrototypeMean, batch_prototypes, class_similarity_distillation


def csw_kd(x, p):
    z, labels, n_old = leaf(x["logits"]), t(x["labels"]), p["n_old_classes"]
    found = batch_prototypes(t(x["features"]), labels, n_old, n_old + p["n_new_classes"])
    loss = class_similarity_distillation(
        z, t(x["logits_old"]), labels, found, t(x["prototypes_old"]), p["temperature"], p["delta"]
    )
    grad = torch.autograd.grad(loss, z)[0] if loss.requires_grad else torch.zeros_like(z)
    return {"batch_prototypes": found, "loss": loss.detach(), "grad_logits": grad}


def prototypes(x, p):
    first = p["n_old_classes"] if p["step"] else 0
    mean = PrototypeMean(first, p["n_old_classes"] + p["n_new_classes"])
    for features, labels in zip(t(x["features"]), t(x["labels"]), strict=True):
        mean.update(features, labels)
    found = mean.mean()
    if p["step"]:
        found[:first] = t(x["prototypes_old"])
    return {"prototypes": found}


ADAPTERS = {"reminder_csw_kd": csw_kd, "reminder_prototypes": prototypes}
