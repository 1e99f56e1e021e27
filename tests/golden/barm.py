"""Adapters of the family barm."""

import numpy as np
import torch
from golden_common import leaf, t

from bench.method.registry import method
from bench.method.resolve import resolve
from bench.method.schedule import scheduled
from bench.models.abn import norm_layers
from bench.models.network import Output, upsample
from bench.protocol.file import load
from bench.protocol.protocol import Step
from methods import barm
from methods.barm.heads import ResidualHeads


def ours(name):
    """Our name of a parameter: head_pre and head.0 are branch 0, ear.0 and head.1 branch 1."""
    kind, *rest = name.split(".")
    if kind == "head_pre":
        return ".".join(("heads.0", *rest))
    number, *rest = rest
    if kind == "ear":
        return ".".join((f"heads.{int(number) + 1}", *rest))
    return ".".join((f"heads.{number}.3", *rest))


def sizes(classes):
    """Channels of each branch: classes begin with background, whose head is step 0's."""
    background, first, *later = classes
    return barm.BARM(None).heads([background + first, *later])


def taken(x, prefix):
    """Arrays whose names begin with a prefix, under their names in the vectors."""
    return {k.removeprefix(prefix): t(v) for k, v in x.items() if k.startswith(prefix)}


def built(width, channels, *states, training=True):
    """Our classifier with the weights of some states, its norms in evaluation mode."""
    classifier = ResidualHeads(width, channels)
    state = {ours(name): value for state in states for name, value in state.items()}
    classifier.load_state_dict({**classifier.state_dict(), **state})
    classifier.train(training)
    for norm in norm_layers(classifier):
        norm.eval()
    return classifier


def barm_head(x, p):
    features = leaf(x["features"])
    classifier = built(features.shape[1], sizes(p["classes"]), taken(x, "p_"))
    logits, _ = classifier(features)
    (logits * t(x["cotangent"])).sum().backward()
    with torch.no_grad():
        evaluated, _ = classifier.eval()(features)
    out = {"logits_eval": evaluated, "logits_train": logits.detach(), "grad_features": features.grad}
    for i, head in enumerate(classifier.heads):
        out[f"grad_head_{i}_weight"] = head[3].weight.grad.flatten(1)
        out[f"grad_head_{i}_bias"] = head[3].bias.grad
    return out


def output(classifier, features, size):
    """What a network with these features puts out."""
    small, extra = classifier(features)
    return Output(upsample(small, size), small, [], features, features, extra)


def barm_iteration(x, p):
    features, labels = leaf(x["features"]), t(x["labels"])
    width, channels = features.shape[1], sizes(p["classes"])
    classifier = built(width, channels, taken(x, "p_"))
    teacher = built(width, channels[:-1], taken(x, "prev_p_"), training=False).requires_grad_(False)
    new, old = (
        output(part, of, labels.shape)
        for part, of in ((classifier, features), (teacher, t(x["features_old"])))
    )
    terms = barm.incremental_terms(new, old, labels, p["threshold"])
    weights = dict(
        zip(("residual_background", "features", "scores", "residual_new"), p["weights"], strict=True)
    )
    loss = sum(weights.get(name, 1) * term for name, term in terms.items())
    loss.backward()
    parameters = dict(classifier.named_parameters())
    names = [name.removeprefix("p_") for name in x if name.startswith("p_")]
    gradients = {f"grad_{name}": parameters[ours(name)].grad for name in names if ours(name) in parameters}
    return {
        "loss": loss.detach(),
        **{f"loss_{name}": term.detach() for name, term in terms.items()},
        "grad_features": features.grad,
        **gradients,
    }


def barm_branch_init(x, p):
    old, fresh = taken(x, "old_"), taken(x, "fresh_")
    width = old["head_pre.0.weight"].shape[0]
    classifier = built(width, sizes(p["classes"]), old, fresh)
    barm.branch_transfer(classifier, statistics=False)
    state = classifier.state_dict()
    return {f"after_{name}": state[ours(name)] for name in (*old, *fresh)}


def barm_predict(x, p):
    return {"prediction": barm.predict_from_small_scores(t(x["logits"]), (p["out_size"], p["out_size"]))}


def barm_lr_schedule(x, p):
    """The published recipe; its factors are for the rates that the released code has beside its flag."""
    base = float(x["base_lr"])
    config = resolve(method("barm"), load("voc-15-1"), "published").config
    rates = {"lr": base, "body_lr": 1e-4 / base, "old_lr": 1e-4 / base, "aspp_lr": 1e-3 / base}
    built_method = barm.BARM(config.model_copy(update=rates).at(p["step"]))
    built_method.step = Step(p["step"], (2,), (1,) if p["step"] else ())
    part = torch.nn.Module
    network = part()
    network.body, network.head = torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1)
    network.classifier = ResidualHeads(1, [2] * (p["step"] + 1))
    built_method.network = network
    newest = network.classifier.heads[-1]
    of_group = {
        "backbone": network.body.weight, "aspp": network.head.weight, "classifier": newest[3].weight,
        "newest head": newest[3].weight, "newest ear": newest[0].weight,
        "head_pre": network.classifier.heads[0][0].weight, "old heads": network.classifier.heads[0][3].weight,
        "old ears": network.classifier.heads[max(p["step"] - 1, 0)][0].weight,
    }  # fmt: skip
    base_of = {id(q): group["lr"] for group in built_method.parameter_groups() for q in group["params"]}
    rate = scheduled(built_method.config)
    total = p["max_iters"]
    return {
        "lrs": np.array(
            [[rate(base_of[id(of_group[g])], i, total) for g in p["groups"]] for i in range(total)]
        )
    }


ADAPTERS = {
    function.__name__: function
    for function in (barm_head, barm_iteration, barm_branch_init, barm_predict, barm_lr_schedule)
}
