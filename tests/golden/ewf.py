"""Adapters of the family ewf: fused weights, and whole training steps through the engine."""

import contextlib
import functools
from unittest import mock

import torch
from golden_common import t
from golden_mib_steps import TinyBody, TinyHead, ours
from golden_steps import Steps, TinyNetwork

from bench.method.registry import method
from methods.ewf import fused_weights

THRESHOLD_SHARE = 0.45
"""Of the authors' option."""


def fusion(**more):
    def adapter(x, p):
        old, new = (
            {name.removeprefix(prefix): t(v) for name, v in x.items() if name.startswith(prefix)}
            for prefix in ("old_", "new_")
        )
        fused = fused_weights(old, new, p["n_old_classes"], p["n_new_classes"], **more)
        return {f"fused_{name}": value for name, value in fused.items()}

    return adapter


def recorded(session, s, word):
    """The weights of an open job as the authors name them."""
    weights = session.method.network.state_dict().items()
    return {
        f"s{s}_{key.replace('classifier.heads.', 'cls.')}_{word}": value.clone() for key, value in weights
    }


@contextlib.contextmanager
def before_the_end(session, s):
    """What an open job has trained, before it ends its step."""
    end_step, seen = session.method.end_step, {}

    def looked():
        seen.update(recorded(session, s, "trained"))
        end_step()

    with mock.patch.object(session.method, "end_step", looked):
        yield seen


def training_steps(x, p):
    """Steps of a few iterations, each a job of the engine that finds what the one before it published."""
    n, sizes, lr = p["iterations_per_step"], p["classes_per_step"], p["lr_per_step"]
    if len(set(lr[1:])) > 1:
        raise ValueError(f"later steps have one learning rate, not {lr[1:]}")
    batch_size = max(2, len(x["s0_images_0"]))  # of the plan; the batches are what they are
    out_channels, width = x["s0_head.conv.weight"].shape[:2]
    kind = TinyNetwork(lambda: TinyBody(width), lambda w: TinyHead(w, out_channels), "linear")
    name = f"ewf+{p['base'].lower()}"
    settings = {
        "first_lr": lr[0], "lr": lr[1], "epochs": 1, "first_epochs": 1, "batch_size": batch_size,
        **{key: p[key] for key in ("momentum", "power", "weight_decay")}, "distillation": p["loss_kd"],
    }  # fmt: skip
    settings = {key: value for key, value in settings.items() if key in method(name).config.model_fields}
    test = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    out = {}

    with Steps(name, sizes, [n * batch_size] * len(sizes), kind) as steps:
        for s in range(len(sizes)):
            batches = [{k: t(x[f"s{s}_{k}_{i}"]) for k in ("images", "labels")} for i in range(n)]
            prefix = f"s{s}_new_" if s else "s0_"
            with steps.open(s, settings, batches, test) as session:
                weights = session.method.network.state_dict()
                for key in [k for k in x if k.startswith(prefix) and k.endswith((".weight", ".bias"))]:
                    weights[ours(key.removeprefix(prefix))].copy_(t(x[key]))
                # The authors' schedule is laid out for more iterations than were recorded.
                session.trainer.run = functools.partial(session.trainer.run, total=p["max_iters"])
                with before_the_end(session, s) as trained:
                    session.train()
                out |= trained | recorded(session, s, "after")
                steps.publish(session)
    return out


ADAPTERS = {
    "ewf_fusion": fusion(),
    "ewf_fusion_threshold": fusion(fused_share=THRESHOLD_SHARE),
    "training_steps_ewf": training_steps,
}
