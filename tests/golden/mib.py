"""Adapters of the family mib: FT, LwF, LwF-MC, ILT, EWC, PI, RW, MiB, the network blocks."""

from functools import partial

import numpy as np
import torch

from bench.data.dataset import Dataset, Split
from bench.losses import cross_entropy, cross_entropy_map
from bench.method import Method, Phase
from bench.models.abn import ActivatedBatchNorm
from bench.models.classifier import LinearClassifier
from bench.models.heads import AsppABN
from bench.models.network import Network, upsample
from bench.models.resnet import ResidualBlock
from bench.protocol import Protocol
from bench.registry import method
from bench.regulariser import quadratic_penalty
from bench.schedule import learning_rate
from bench.train import Trainer
from methods.ewc import OnlineFisher
from methods.ilt import feature_distillation_mse
from methods.lwf import knowledge_distillation, knowledge_distillation_map
from methods.lwf_mc import bce_with_logits_ignore, bce_with_logits_ignore_map, binary_distillation, icarl_disjoint_loss
from methods.mib import (
    background_classifier_init,
    unbiased_cross_entropy,
    unbiased_cross_entropy_map,
    unbiased_distillation,
    unbiased_distillation_map,
)
from methods.pi import PathIntegral
from methods.rw import RiemannianWalk


def t(array):
    return torch.from_numpy(np.array(array))


def leaf(array):
    return t(array).requires_grad_()


def gradient(loss, of):
    return torch.autograd.grad(loss, of)[0]


def toy_dataset(name, n_classes):
    """A data set of the kind of VOC or ADE with some classes only."""
    background = "unlabelled" if name == "ade" else "class"
    split = Split("{name}.jpg", "{name}.png")
    return Dataset(name, name, tuple(map(str, range(n_classes))), background, "small", (".",), split, split)


# ---- losses ------------------------------------------------------------------------------------------------------------


def loss_and_map(function, function_map, *inputs):
    def adapter(x, p):
        z = leaf(x["logits"])
        more = [p[name] if name in p else t(x[name]) for name in inputs]
        loss = function(z, *more)
        return {"loss": loss.detach(), "loss_map": function_map(z, *more).detach(), "grad_logits": gradient(loss, z)}

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
        "loss_classification": classification.detach(), "loss_distillation": distillation.detach(), "loss": loss.detach(),
        "grad_logits": gradient(loss, z),
    }  # fmt: skip


def icarl(x, p):
    z = leaf(x["logits"])
    loss = icarl_disjoint_loss(z, t(x["labels"]), t(x["logits_old"]), p["keep_background_from_labels"], p["ignore_index"])
    return {"loss": loss.detach(), "grad_logits": gradient(loss, z)}


def feature_mse(x, p):
    f = leaf(x["features"])
    loss = feature_distillation_mse(f, t(x["features_old"]))
    return {"loss": loss.detach(), "grad_features": gradient(loss, f)}


# ---- classifier and network blocks -----------------------------------------------------------------------------------


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
        "out_eval": out_eval, "out_train": out.detach(), "running_mean_after": norm.running_mean, "running_var_after": norm.running_var,
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
    return block_outputs(with_parameters(ResidualBlock(p["in_channels"], p["channels"], p["stride"], p["dilation"]), x), x)


def aspp_head(x, p):
    norm = partial(ActivatedBatchNorm, activation=p["activation"], slope=p["slope"])
    head = AsppABN(p["in_channels"], p["hidden_channels"], p["out_channels"], p["dilations"], p["pooling_size"], norm)
    return block_outputs(with_parameters(head, x), x, trains=len(x["x"]) > 1)  # the pooled branch has no statistics of one image


# ---- optimisation ------------------------------------------------------------------------------------------------------


def sgd_nesterov_poly(x, p):
    """The engine's optimiser and schedule on a loss whose gradient is given."""
    parameter = torch.nn.Parameter(t(x["param"]))
    built = Method(Method.Config(lr=p["lr"], momentum=p["momentum"], weight_decay=p["weight_decay"]))
    rates, parameters = [], []
    phase = Phase(
        "training", 1, [{"params": [parameter], "lr": p["lr"]}], lambda batch: {"dot": (parameter * batch.images).sum()},
        lambda base, i, total: learning_rate(base, i, total, "poly", p["power"]),
    )  # fmt: skip
    protocol = Protocol("toy", toy_dataset("voc", 2), "overlapped", ((1,),))
    built.attach(protocol.step(0), torch.nn.Identity(), None, None, {})
    trainer = Trainer(built, 0, torch.device("cpu"))
    trainer.optimiser = trainer.new_optimiser(phase)
    for k, g in enumerate(x["grads"]):
        raw = {"images": t(g), "labels": torch.zeros(1)}
        rates.append(trainer.iteration(phase, raw, k, p["max_iters"])[1])
        parameters.append(parameter.detach().clone().numpy())
    return {"lr_used": np.array(rates), "params": np.array(parameters)}


def regularizer(kind):
    class Config:
        fisher_alpha, walk_interval = 0.9, 10

    def adapter(x, p):
        Config.fisher_alpha, Config.walk_interval = p["alpha"], p["iterations"]
        out, previous, old = {}, {}, {}
        params = {}
        for s in (0, 1):
            names = p[f"param_names_step{s}"]
            params.update({n: t(x[f"s{s}_{n}_init"]) for n in names if n not in params})
            state = {}
            recorder = kind(state, Config)
            recorder.begin(params, previous)
            importance = kind.importance(previous, p["normalize"]) if s else {}
            out.update({f"s{s}_importance_{n}": importance[n] for n in old})
            for k in range(p["updates_per_step"]):
                recorder.update({n: t(x[f"s{s}_{n}_grad_{k}"]) for n in names}, params)
                leaves = {n: v.clone().requires_grad_() for n, v in params.items()}
                penalty = quadratic_penalty(leaves, old, importance) if old else torch.zeros(())
                out[f"s{s}_penalty_{k}"] = penalty.detach()
                if old:
                    grads = torch.autograd.grad(penalty, [leaves[n] for n in old])
                    out.update({f"s{s}_penalty_grad_{n}_{k}": g for n, g in zip(old, grads, strict=True)})
                for n in names:
                    for ours, theirs in (("fisher", "fisher"), ("path", "path"), ("walk", "pathscore")):
                        if recorder.key(ours, n) in state:
                            out[f"s{s}_{theirs}_{n}_{k}"] = state[recorder.key(ours, n)].clone()
                params = {n: v + t(x[f"s{s}_{n}_delta_{k}"]) for n, v in params.items()}
            recorder.finish(params)
            out.update({f"s{s}_state_{k}_{n}": state[recorder.key(k, n)] for k in kind.kinds for n in names})
            previous, old = state, {n: v.clone() for n, v in params.items()}
        return out

    return adapter


# ---- whole training steps ------------------------------------------------------------------------------------------------


class TinyBody(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, weight.shape[0], 3, stride=2, padding=1, bias=False)

    def forward(self, x):
        y = torch.nn.functional.leaky_relu(self.conv(x), 0.01)
        return y, [y]


class TinyHead(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.conv = torch.nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)

    def forward(self, x):
        return torch.nn.functional.leaky_relu(self.conv(x), 0.01)


def training_step(name):
    """Two steps of three iterations through the engine's own training loop."""

    def adapter(x, p):
        groups = tuple(tuple(range(1, n) if i == 0 else range(n)) for i, n in enumerate(p["classes_per_step"]))
        first = sum(len(g) for g in groups[:1]) + 1
        groups = (groups[0], tuple(range(first, first + p["classes_per_step"][1])))
        protocol = Protocol("toy", toy_dataset("voc", 1 + sum(map(len, groups))), "overlapped", groups)
        network = Network(
            TinyBody(x["s0_body.conv.weight"]), TinyHead(x["s0_head.conv.weight"]),
            LinearClassifier(x["s0_head.conv.weight"].shape[0], p["classes_per_step"][:1]),
        )  # fmt: skip
        theirs = {"cls.0": "classifier.heads.0", "cls.1": "classifier.heads.1"}

        def ours(key):
            return theirs.get(key[:5], key[:5]) + key[5:]

        network.load_state_dict({ours(k[3:]): t(v) for k, v in x.items() if k.startswith(("s0_body", "s0_head", "s0_cls"))})
        spec = method(name)
        out, previous = {}, {}
        for s in (0, 1):
            owner = method(spec.first_step) if s == 0 else spec
            values = {
                "lr": p["lr_per_step"][1], "first_lr": p["lr_per_step"][0], "epochs": 1, "momentum": p["momentum"], "power": p["power"],
                "weight_decay": p["weight_decay"], "distillation": p["loss_kd"] or p["icarl_importance"], "features": p["loss_de"],
                "importance": p["reg_importance"], "fisher_alpha": p["reg_alpha"], "walk_interval": p["reg_iterations"],
            }  # fmt: skip
            built = owner.build(owner.config(**{k: v for k, v in values.items() if k in owner.config.model_fields}))
            teacher = None
            if s:
                import copy

                teacher = copy.deepcopy(network).eval().requires_grad_(False)
                network.classifier.grow(p["classes_per_step"][1])
                new = {ours(k[7:]): t(v) for k, v in x.items() if k.startswith("s1_new_")}
                network.load_state_dict(new, strict=False)
            built.attach(protocol.step(s), network, teacher, None, previous)
            if hasattr(built, "init_classifier"):
                built.init_classifier()
            built.start_step()
            built.setup()
            logged = []
            trainer = Trainer(built, 0, torch.device("cpu"), on_iteration=lambda *a, logged=logged: logged.append(a[4]))
            batches = [{"images": t(x[f"s{s}_images_{k}"]), "labels": t(x[f"s{s}_labels_{k}"])} for k in range(p["iterations_per_step"])]
            built.batches = lambda epoch, batches=batches: batches
            for index, phase in enumerate(built.phases()):
                trainer.run(index, phase, total=p["max_iters"])
            built.end_step()
            previous = dict(built.state)
            losses = [[next(iter(terms.values())), sum(list(terms.values())[1:])] for terms in logged]
            out[f"s{s}_losses"] = np.array(losses)
            back = {v: k for k, v in theirs.items()}
            for key, value in network.state_dict().items():
                name_ = next((back[prefix] + key[len(prefix) :] for prefix in back if key.startswith(prefix)), key)
                out[f"s{s}_{name_}_after"] = value.clone()
        return out

    return adapter


ADAPTERS = {
    "cross_entropy_mean_all_pixels": loss_and_map(cross_entropy, cross_entropy_map, "labels", "ignore_index"),
    "unbiased_cross_entropy": loss_and_map(unbiased_cross_entropy, unbiased_cross_entropy_map, "labels", "n_old_classes", "ignore_index"),
    "knowledge_distillation": loss_and_map(knowledge_distillation, knowledge_distillation_map, "logits_old", "alpha"),
    "unbiased_distillation": loss_and_map(unbiased_distillation, unbiased_distillation_map, "logits_old", "alpha"),
    "bce_with_logits_ignore": bce,
    "lwf_mc_loss": lwf_mc,
    "icarl_disjoint_loss": icarl,
    "feature_distillation_mse": feature_mse,
    "background_classifier_init": background_init,
    "segmentation_logits": segmentation_logits,
    "activated_batch_norm": activated_batch_norm,
    "residual_block": residual_block,
    "aspp_head": aspp_head,
    "sgd_nesterov_poly": sgd_nesterov_poly,
    "ewc_regularizer": regularizer(OnlineFisher),
    "path_integral_regularizer": regularizer(PathIntegral),
    "riemannian_walk_regularizer": regularizer(RiemannianWalk),
    **{
        f"training_step_{golden}": training_step(name)
        for golden, name in (
            ("fine_tuning", "ft"), ("lwf", "lwf"), ("lwf_mc", "lwf-mc"), ("ilt", "ilt"), ("ewc", "ewc"), ("pi", "pi"), ("rw", "rw"), ("mib", "mib"),
        )
    },
}  # fmt: skip
