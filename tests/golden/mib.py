"""Adapters of the family mib: losses of FT, LwF, LwF-MC, ILT and MiB, the network blocks."""

from functools import partial

import torch
from golden_common import leaf, t

from bench.method.losses import cross_entropy, cross_entropy_map
from bench.models.abn import ActivatedBatchNorm
from bench.models.classifier import LinearClassifier
from bench.models.heads import AsppABN
from bench.models.network import upsample
from bench.models.resnet import ResidualBlock
from methods.ilt import feature_distillation_mse
from methods.lwf import knowledge_distillation, knowledge_distillation_map
from methods.lwf_mc import (
    bce_with_logits_ignore,
    bce_with_logits_ignore_map,
    binary_distillation,
    icarl_disjoint_loss,
)
from methods.mib import (
    background_classifier_init,
    unbiased_cross_entropy,
    unbiased_cross_entropy_map,
    unbiased_distillation,
    unbiased_distillation_map,
)


def gradient(loss, of):
    return torch.autograd.grad(loss, of)[0]


# ---- losses ------------------------------------------------------------------------------------------------


def loss_and_map(function, function_map, *inputs):
    def adapter(x, p):
        z = leaf(x["logits"])
        more = [p[name] if name in p else t(x[name]) for name in inputs]
        loss = function(z, *more)
        return {
            "loss": loss.detach(),
            "loss_map": function_map(z, *more).detach(),
            "grad_logits": gradient(loss, z),
        }

    return adapter


def bce(x, p):
    z, y = leaf(x["logits"]), t(x["labels"])
    loss = bce_with_logits_ignore(z, y, p["ignore_index"])
    per_pixel = bce_with_logits_ignore_map(z, y, p["ignore_index"])
    valid = per_pixel[y != p["ignore_index"]].mean()
    return {
        "loss": loss.detach(), "loss_map": per_pixel.detach(), "grad_logits": gradient(loss, z),
        "loss_valid_mean": valid.detach(), "grad_logits_valid_mean": gradient(valid, z),
    }  # fmt: skip


def lwf_mc(x, p):
    z = leaf(x["logits"])
    classification = bce_with_logits_ignore(z, t(x["labels"]), p["ignore_index"])
    distillation = p["importance"] * binary_distillation(z, t(x["logits_old"]))
    loss = classification + distillation
    return {
        "loss_classification": classification.detach(), "loss_distillation": distillation.detach(),
        "loss": loss.detach(),
        "grad_logits": gradient(loss, z),
    }  # fmt: skip


def icarl(x, p):
    z = leaf(x["logits"])
    loss = icarl_disjoint_loss(
        z, t(x["labels"]), t(x["logits_old"]), p["keep_background_from_labels"], p["ignore_index"]
    )
    return {"loss": loss.detach(), "grad_logits": gradient(loss, z)}


def feature_mse(x, p):
    f = leaf(x["features"])
    loss = feature_distillation_mse(f, t(x["features_old"]))
    return {"loss": loss.detach(), "grad_features": gradient(loss, f)}


# ---- classifier and network blocks -------------------------------------------------------------------------


def classifier_of(x, n, weight="weight_{}", bias="bias_{}"):
    """A linear classifier with the given heads."""
    heads = [(t(x[weight.format(i)]), t(x[bias.format(i)])) for i in range(n)]
    classifier = LinearClassifier(heads[0][0].shape[1], [len(b) for _, b in heads])
    with torch.no_grad():
        for head, (w, b) in zip(classifier.heads, heads, strict=True):
            head.weight.copy_(w.flatten(1)[:, :, None, None])
            head.bias.copy_(b)
    return classifier


def background_init(x, p):
    n = len(p["classes_per_step"])
    classifier = classifier_of(x, n)
    background_classifier_init(classifier)
    out = {f"weight_{i}_after": classifier.heads[i].weight.detach().flatten(1) for i in range(n)}
    return {**out, **{f"bias_{i}_after": classifier.heads[i].bias.detach() for i in range(n)}}


def segmentation_logits(x, p):
    small, _ = classifier_of(x, len(p["classes_per_step"]))(t(x["features"]))
    return {"logits": upsample(small, tuple(p["out_size"])).detach()}


def activated_batch_norm(x, p):
    norm = ActivatedBatchNorm(len(x["weight"]), p["activation"], p["slope"], p["eps"], p["momentum"])
    norm.load_state_dict({k: t(x[k]) for k in ("weight", "bias", "running_mean", "running_var")})
    z = leaf(x["x"])
    out_eval = norm.eval()(z).detach()
    out = norm.train()(z)
    out.backward(t(x["cotangent"]))
    return {
        "out_eval": out_eval, "out_train": out.detach(),
        "running_mean_after": norm.running_mean, "running_var_after": norm.running_var,
        "grad_x": z.grad, "grad_weight": norm.weight.grad, "grad_bias": norm.bias.grad,
    }  # fmt: skip


def with_parameters(module, x):
    module.load_state_dict({k[2:]: t(v) for k, v in x.items() if k.startswith("p_")})
    return module


def block_outputs(module, x, trains=True):
    z = leaf(x["x"])
    out = {"out_eval": module.eval()(z).detach()}
    if trains and "cotangent" in x:
        result = module.train()(z)
        result.backward(t(x["cotangent"]))
        out.update({"out_train": result.detach(), "grad_x": z.grad})
    return {**out, **{f"after_{k}": v for k, v in module.state_dict().items() if "running" in k}}


def residual_block(x, p):
    return block_outputs(
        with_parameters(ResidualBlock(p["in_channels"], p["channels"], p["stride"], p["dilation"]), x), x
    )


def aspp_head(x, p):
    norm = partial(ActivatedBatchNorm, activation=p["activation"], slope=p["slope"])
    head = AsppABN(
        p["in_channels"], p["hidden_channels"], p["out_channels"], p["dilations"], p["pooling_size"], norm
    )
    return block_outputs(
        with_parameters(head, x), x, trains=len(x["x"]) > 1
    )  # the pooled branch has no statistics of one image


ADAPTERS = {
    "cross_entropy_mean_all_pixels": loss_and_map(cross_entropy, cross_entropy_map, "labels", "ignore_index"),
    "unbiased_cross_entropy": loss_and_map(
        unbiased_cross_entropy, unbiased_cross_entropy_map, "labels", "n_old_classes", "ignore_index"
    ),
    "knowledge_distillation": loss_and_map(
        knowledge_distillation, knowledge_distillation_map, "logits_old", "alpha"
    ),
    "unbiased_distillation": loss_and_map(
        unbiased_distillation, unbiased_distillation_map, "logits_old", "alpha"
    ),
    "bce_with_logits_ignore": bce,
    "lwf_mc_loss": lwf_mc,
    "icarl_disjoint_loss": icarl,
    "feature_distillation_mse": feature_mse,
    "background_classifier_init": background_init,
    "segmentation_logits": segmentation_logits,
    "activated_batch_norm": activated_batch_norm,
    "residual_block": residual_block,
    "aspp_head": aspp_head,
}
