"""Adapters of the family nest."""

import numpy as np
import torch
from golden_common import t
from golden_steps import Steps, TinyNetwork

from bench.models.swin import Swin
from methods.nest import (
    STATE,
    ClassSimilarity,
    Transformation,
    finalised_classifier,
    generated_logits,
    pretuning_loss,
)


def transformation_of(x, suffix="", requires_grad=False):
    return Transformation(
        *(t(x[name + suffix]).requires_grad_(requires_grad) for name in Transformation._fields)
    )


def class_similarity(x, p):
    found = ClassSimilarity(t(x["old_weight"]), p["n_new_classes"])
    out = {}
    for k in range(p["n_images"]):
        found.update(*(t(x[name][k : k + 1]) for name in ("features", "logits_old", "labels")))
        out[f"importance_after_{k + 1}"], out[f"mixing_after_{k + 1}"] = found.importance(), found.mixing()
    return out


def gradients(loss, transformation):
    found = torch.autograd.grad(loss, transformation)
    return {f"grad_{name}": g for name, g in zip(Transformation._fields, found, strict=True)}


def logits(x, p):
    learned = transformation_of(x, requires_grad=True)
    out = generated_logits(t(x["features"]), t(x["old_weight"]), t(x["old_bias"]), learned)
    return {"logits": out.detach(), **gradients((out * t(x["cotangent"])).sum(), learned)}


def loss(x, p):
    learned = transformation_of(x, requires_grad=True)
    out = pretuning_loss(t(x["features"]), t(x["labels"]), t(x["old_weight"]), t(x["old_bias"]), learned)
    return {"loss": out.detach(), **gradients(out, learned)}


def finalise(x, p):
    weight, bias = finalised_classifier(t(x["old_weight"]), t(x["old_bias"]), transformation_of(x))
    return {"weight_after": weight, "bias_after": bias}


class FeaturesAsImages(torch.nn.Identity):
    """A body that passes on what it is given, and the head that does the same."""

    def __init__(self, width):
        super().__init__()
        self.out_channels = width

    def forward(self, x):
        return x, []


class Unchanged(torch.nn.Identity):
    def __init__(self, width):
        super().__init__()
        self.out_channels = width


def trajectory(x, p):
    """The pre-tuning phase of a job of nest+ft from a given start; the network's images are the features."""
    sizes, width = p["classes_per_step"], x["old_weight"].shape[1]
    weights, biases = (t(x[name]).split(sizes[:-1]) for name in ("old_weight", "old_bias"))
    names = {"base_lr": "lr", "lr_scale": "pretuning_lr_scale", "momentum": "momentum", "power": "power"}
    settings = {ours: p[theirs] for theirs, ours in names.items()}
    settings |= {
        "weight_decay": p["weight_decay"],
        "pretuning_epochs": 1,
        "epochs": 1,
        "first_epochs": 1,
        "batch_size": 2,
    }
    batches = [{"images": t(f), "labels": t(y)} for f, y in zip(x["features"], x["labels"], strict=True)]
    test = torch.zeros(1, width, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    kind = TinyNetwork(lambda: FeaturesAsImages(width), Unchanged, "linear")
    out, rates = {}, []
    with Steps("nest+ft", sizes, [2 * len(batches)] * len(sizes), kind) as steps:
        for index, (weight, bias) in enumerate(
            zip(weights, biases, strict=True)
        ):  # what came before, untrained
            with steps.open(index, settings, batches, test) as session:
                head = session.method.network.classifier.heads[-1]
                head.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
                session.journal.rewind(0)
                steps.publish(session)
        with steps.open(len(sizes) - 1, settings, batches, test) as session:
            nest = session.method
            start = transformation_of(x, "_0")._asdict()
            nest.state.update({STATE + name: tensor for name, tensor in start.items()})
            nest.setup()

            def record(phase, epoch, iteration, total, terms, rate):
                rates.append(rate)
                now = {name: nest.state[STATE + name].detach().clone() for name in Transformation._fields}
                out.update({f"{name}_{iteration + 1}": value for name, value in now.items()})

            session.trainer.on_iteration = record
            session.trainer.run(0, nest.phases()[0], total=p["max_iters"])
    return {**out, "lr": np.array(rates)}


def swin_backbone_features(x, p):
    body = Swin(
        p["embed_dim"], p["depths"], p["num_heads"], p["window_size"], p["patch_size"], p["mlp_ratio"]
    ).eval()
    body.load_state_dict(
        {name.removeprefix("param/"): t(value) for name, value in x.items() if name.startswith("param/")}
    )
    last, maps = body(t(x["image"]))
    return {f"stage_{i + 1}": stage.detach() for i, stage in enumerate([*maps, last])}


ADAPTERS = {
    "nest_class_similarity": class_similarity,
    "nest_generated_logits": logits,
    "nest_pretuning_loss": loss,
    "nest_finalise_classifier": finalise,
    "nest_pretuning_trajectory": trajectory,
    "swin_backbone_features": swin_backbone_features,
}
