"""Adapters of the family dft: whole training steps through the engine."""

import functools

import torch
from golden_common import t
from golden_mib_steps import TinyHead, ours
from golden_steps import Steps, TinyNetwork

from bench.models.abn import ActivatedBatchNorm


class TinyBody(torch.nn.Module):
    """3x3 convolution of stride 2, and the activated norm."""

    def __init__(self, channels):
        super().__init__()
        self.out_channels = channels
        self.conv = torch.nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn = ActivatedBatchNorm(channels)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y, [y]


def training_steps(x, p):
    """Steps of a few iterations, each a job of the engine that finds what the one before it published."""
    n, sizes, lr = p["iterations_per_step"], p["classes_per_step"], p["lr_per_step"]
    if len(set(lr[1:])) > 1:
        raise ValueError(f"later steps have one learning rate, not {lr[1:]}")
    batch_size = max(2, len(x["s0_images_0"]))  # of the plan; the batches are what they are
    out_channels, width = x["s0_head.conv.weight"].shape[:2]
    kind = TinyNetwork(lambda: TinyBody(width), lambda w: TinyHead(w, out_channels), "linear")
    settings = {
        "first_lr": lr[0], "lr": lr[-1], "epochs": 1, "first_epochs": 1,
        "batch_size": batch_size, **{key: p[key] for key in ("momentum", "power", "weight_decay")},
    }  # fmt: skip
    test = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    out = {}
    with Steps("dft", sizes, [n * batch_size] * len(sizes), kind) as steps:
        for s in range(len(sizes)):
            batches = [{k: t(x[f"s{s}_{k}_{i}"]) for k in ("images", "labels")} for i in range(n)]
            with steps.open(s, settings, batches, test) as session:
                weights = session.method.network.state_dict()
                for key in [k for k in x if s == 0 and k.startswith("s0_") and "_images_" not in k]:
                    if "_labels_" not in key:
                        weights[ours(key.removeprefix("s0_"))].copy_(t(x[key]))
                # The authors' schedule is laid out for more iterations than were recorded.
                session.trainer.run = functools.partial(session.trainer.run, total=p["max_iters"])
                session.train()
                for key, value in session.method.network.state_dict().items():
                    out[f"s{s}_{key.replace('classifier.heads.', 'cls.')}_after"] = value.clone()
                steps.publish(session)
    return out


ADAPTERS = {"training_steps_dft": training_steps}
