"""Adapters of the family nest."""

import itertools

import numpy as np
import torch

from bench.data.dataset import Dataset, Split
from bench.models.classifier import LinearClassifier
from bench.models.network import Network
from bench.models.swin import Swin
from bench.protocol import Protocol
from bench.registry import method
from bench.train import Trainer
from methods.nest import STATE, ClassSimilarity, Transformation, finalised_classifier, generated_logits, pretuning_loss


def t(array):
    return torch.from_numpy(np.array(array))


def transformation_of(x, suffix="", requires_grad=False):
    return Transformation(*(t(x[name + suffix]).requires_grad_(requires_grad) for name in Transformation._fields))


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
    """A body that passes on what it is given."""

    def forward(self, x):
        return x, []


def trajectory(x, p):
    """Pre-tuning of nest+ft through the engine's own training loop; the network's images are the features."""
    sizes = p["classes_per_step"]
    classes = iter(range(1, sum(sizes)))
    groups = tuple(tuple(itertools.islice(classes, n)) for n in [sizes[0] - 1, *sizes[1:]])
    split = Split("{name}.jpg", "{name}.png")
    dataset = Dataset("toy", "toy", tuple(map(str, range(sum(sizes)))), "class", "small", (".",), split, split)
    classifier = LinearClassifier(x["old_weight"].shape[1], sizes)
    weights, biases = (t(x[name]).split(sizes[:-1]) for name in ("old_weight", "old_bias"))
    for head, weight, bias in zip(classifier.heads, weights, biases, strict=False):
        head.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
    spec = method("nest+ft")
    settings = {name: p[name] for name in ("momentum", "weight_decay", "power")}
    nest = spec.build(spec.config(lr=p["base_lr"], pretuning_lr_scale=p["lr_scale"], pretuning_epochs=1, **settings))
    protocol = Protocol("toy", dataset, "overlapped", groups)
    nest.attach(protocol.step(len(sizes) - 1), Network(FeaturesAsImages(), torch.nn.Identity(), classifier), None, None, {})
    nest.state.update({STATE + name: tensor for name, tensor in transformation_of(x, "_0")._asdict().items()})
    nest.setup()
    nest.batches = lambda epoch: [{"images": t(f), "labels": t(y)} for f, y in zip(x["features"], x["labels"], strict=True)]
    out, rates = {}, []

    def record(phase, epoch, iteration, total, terms, rate):
        rates.append(rate)
        out.update({f"{name}_{iteration + 1}": nest.state[STATE + name].detach().clone() for name in Transformation._fields})

    Trainer(nest, 0, torch.device("cpu"), on_iteration=record).run(0, nest.phases()[0], total=p["max_iters"])
    return {**out, "lr": np.array(rates)}


def swin_backbone_features(x, p):
    body = Swin(p["embed_dim"], p["depths"], p["num_heads"], p["window_size"], p["patch_size"], p["mlp_ratio"]).eval()
    body.load_state_dict({name.removeprefix("param/"): t(value) for name, value in x.items() if name.startswith("param/")})
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
