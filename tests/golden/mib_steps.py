"""Adapters of the family mib: the optimiser, the regularisers, whole training steps through the engine."""

import functools
from typing import Any

import numpy as np
import torch
from golden_chain_mib import METHODS
from golden_common import t, toy_dataset
from golden_steps import Steps, TinyNetwork

from bench.method.interface import Length, Method, Phase
from bench.method.registry import method
from bench.method.regulariser import quadratic_penalty
from bench.method.schedule import learning_rate
from bench.protocol.protocol import Protocol
from bench.train.trainer import Trainer
from methods.ewc import EWC, OnlineFisher
from methods.pi import PI, PathIntegral
from methods.rw import RW, RiemannianWalk


def sgd_nesterov_poly(x, p):
    """The engine's optimiser and schedule on a loss whose gradient is given."""
    parameter = torch.nn.Parameter(t(x["param"]))
    built = Method(Method.Config(lr=p["lr"], momentum=p["momentum"], weight_decay=p["weight_decay"]))
    built.step = Protocol("toy", toy_dataset("voc", 2), "overlapped", ((1,),)).step(0)
    built.network = torch.nn.Identity()
    rates, parameters = [], []
    phase = Phase(
        "training",
        Length(1, 1),
        [{"params": [parameter], "lr": p["lr"]}],
        lambda batch: {"dot": (parameter * batch.images).sum()},
        lambda base, i, total: learning_rate(base, i, total, "poly", p["power"]),
        built.optimiser,
    )
    trainer = Trainer(built, 0, torch.device("cpu"))
    trainer.optimiser = trainer.new_optimiser(phase)
    for k, g in enumerate(x["grads"]):
        raw = {"images": t(g), "labels": torch.zeros(1)}
        rates.append(trainer.iteration(phase, raw, k, p["max_iters"])[1])
        parameters.append(parameter.detach().clone().numpy())
    return {"lr_used": np.array(rates), "params": np.array(parameters)}


# ---- regularisers ------------------------------------------------------------------------------------------

RUNNING = {
    "fisher": (OnlineFisher, "running"),
    "path": (PathIntegral, "integral"),
    "pathscore": (RiemannianWalk, "path"),
}
"""What the authors keep while a step trains, in our recorders' words."""
LEFT: dict[type[Method], dict[str, Any]] = {
    EWC: {"fisher": (OnlineFisher, "running")},
    PI: {"score": (PathIntegral, "score")},
    RW: {"fisher": (OnlineFisher, "running"), "score": (RiemannianWalk, "score")},
}
"""What they hand on to the next step."""


def regularizer(kind):
    """A method's recorders and its penalty, update by update."""

    def adapter(x, p):
        values = {"fisher_alpha": p["alpha"], "walk_interval": p["iterations"]}
        config = kind.Config(**{k: v for k, v in values.items() if k in kind.Config.model_fields})
        settings = kind.recorder_settings(config)
        out, previous, old, params = {}, {}, {}, {}
        for s in (0, 1):
            names = p[f"param_names_step{s}"]
            params.update({n: t(x[f"s{s}_{n}_init"]) for n in names if n not in params})
            state = {}
            recorders = [recorder(state, **settings[recorder.name]) for recorder in kind.recorders]
            for recorder in recorders:
                recorder.begin(params, previous)
            importance = kind.importance_of(previous, p["normalize"]) if s else {}
            out.update({f"s{s}_importance_{n}": importance[n] for n in old})
            for k in range(p["updates_per_step"]):
                for recorder in recorders:
                    recorder.update({n: t(x[f"s{s}_{n}_grad_{k}"]) for n in names}, params)
                leaves = {n: v.clone().requires_grad_() for n, v in params.items()}
                penalty = quadratic_penalty(leaves, old, importance) if old else torch.zeros(())
                out[f"s{s}_penalty_{k}"] = penalty.detach()
                if old:
                    grads = torch.autograd.grad(penalty, [leaves[n] for n in old])
                    out.update({f"s{s}_penalty_grad_{n}_{k}": g for n, g in zip(old, grads, strict=True)})
                for theirs, (recorder, ours) in RUNNING.items():
                    kept = {n: state[recorder.key(ours, n)] for n in names if recorder.key(ours, n) in state}
                    out.update({f"s{s}_{theirs}_{n}_{k}": value.clone() for n, value in kept.items()})
                params = {n: v + t(x[f"s{s}_{n}_delta_{k}"]) for n, v in params.items()}
            for recorder in recorders:
                recorder.finish(params)
            for theirs, (recorder, ours) in LEFT[kind].items():
                out.update({f"s{s}_state_{theirs}_{n}": state[recorder.key(ours, n)] for n in names})
            previous, old = state, {n: v.clone() for n, v in params.items()}
        return out

    return adapter


# ---- whole training steps ----------------------------------------------------------------------------------


class TinyBody(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.out_channels = width
        self.conv = torch.nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)

    def forward(self, x):
        y = torch.nn.functional.leaky_relu(self.conv(x), 0.01)
        return y, [y]


class TinyHead(torch.nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.out_channels = out
        self.conv = torch.nn.Conv2d(width, out, 1, bias=False)

    def forward(self, x):
        return torch.nn.functional.leaky_relu(self.conv(x), 0.01)


def ours(key):
    return f"classifier.heads.{key.removeprefix('cls.')}" if key.startswith("cls.") else key


def step_settings(spec, p):
    """The settings of a case, as far as the method has them."""
    values = {
        "first_lr": p["lr_per_step"][0], "lr": p["lr_per_step"][1], "epochs": 1, "first_epochs": 1,
        "momentum": p["momentum"], "power": p["power"], "weight_decay": p["weight_decay"],
        "distillation": p["loss_kd"] or p["icarl_importance"], "features": p["loss_de"],
        "importance": p["reg_importance"], "fisher_alpha": p["reg_alpha"],
        "walk_interval": p["reg_iterations"],
    }  # fmt: skip
    return {name: value for name, value in values.items() if name in spec.config.model_fields}


def training_step(name):
    """Two steps of a few iterations, each a job of the engine that finds what the one before it published."""

    def adapter(x, p):
        n = p["iterations_per_step"]
        batch_size = max(2, len(x["s0_images_0"]))  # of the plan; the batches are what they are
        out_channels, width = x["s0_head.conv.weight"].shape[:2]
        kind = TinyNetwork(lambda: TinyBody(width), lambda w: TinyHead(w, out_channels), "linear")
        settings = {**step_settings(method(name), p), "batch_size": batch_size}
        test = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
        out = {}
        with Steps(name, p["classes_per_step"], [n * batch_size] * 2, kind) as steps:
            for s, prefix in enumerate(("s0_", "s1_new_")):
                batches = [{k: t(x[f"s{s}_{k}_{i}"]) for k in ("images", "labels")} for i in range(n)]
                with steps.open(s, settings, batches, test) as session:
                    weights = session.method.network.state_dict()
                    for key in [k for k in x if k.startswith(prefix) and k.endswith((".weight", ".bias"))]:
                        weights[ours(key.removeprefix(prefix))].copy_(t(x[key]))
                    # The authors' schedule is laid out for more iterations than were recorded.
                    session.trainer.run = functools.partial(session.trainer.run, total=p["max_iters"])
                    session.train()
                    for key, value in weights.items():
                        theirs = key.replace("classifier.heads.", "cls.")
                        out[f"s{s}_{theirs}_after"] = value.clone()
                    steps.publish(session)
                terms = [list(line.values()) for line in steps.logged()]
                out[f"s{s}_losses"] = np.array([[first, sum(others)] for first, *others in terms])
        return out

    return adapter


ADAPTERS = {
    "sgd_nesterov_poly": sgd_nesterov_poly,
    "ewc_regularizer": regularizer(EWC),
    "path_integral_regularizer": regularizer(PI),
    "riemannian_walk_regularizer": regularizer(RW),
    **{f"training_step_{golden}": training_step(name) for golden, name in METHODS.items()},
}
