"""Adapters of the family chain-mib: whole chains of FT, LwF, LwF-MC, ILT, EWC, PI, RW and MiB."""

import itertools

from golden_chain import Chain, number
from golden_steps import TinyNetwork

from bench.models.heads import AsppABN
from bench.models.resnet import ResNetABN

DILATIONS = (6, 12, 18)
POOLING = 32


class MibChain(Chain):
    """A chain of the MiB family: a ResNet of activated batch norm in the sizes of the case's weights."""

    settings_of = ("distillation", "features", "importance", "walk_interval")
    renamed = {"alpha": "fisher_alpha"}
    other = ("lr_per_step", "penalty")

    def kind(self):
        shapes = self.p["weight_shapes"]
        stages = [k for k in range(2, 10) if f"body.mod{k}.block1.convs.conv1.weight" in shapes]
        blocks = [
            next(b for b in itertools.count() if f"body.mod{k}.block{b + 1}.convs.conv1.weight" not in shapes)
            for k in stages
        ]
        bottleneck = "body.mod2.block1.convs.conv3.weight" in shapes
        last = 3 if bottleneck else 2
        widths = [shapes[f"body.mod{k}.block1.convs.conv{last}.weight"][0] for k in stages]
        hidden, out = shapes["head.map_convs.0.weight"][0], shapes["head.red_conv.weight"][0]
        return TinyNetwork(
            lambda: ResNetABN(blocks, widths, bottleneck, stem="small"),
            lambda width: AsppABN(width, hidden, out, DILATIONS, POOLING),
            "linear",
        )

    def ours(self, name):
        return f"classifier.heads.{name.removeprefix('cls.')}" if name.startswith("cls.") else name

    def settings(self, index):
        rates = self.p["lr_per_step"]
        return {"first_lr": rates[0], "lr": rates[max(index, 1)]}

    def means(self, steps):
        without = steps.score("mib")
        return {
            **super().means(steps),
            "mean_iou_old_without_background": number(without.old),
            "mean_iou_all_without_background": number(without.all),
        }


def chain(name, function):
    return lambda x, p: MibChain(name, x, p, f"{function}.").run()


METHODS = {
    "fine_tuning": "ft", "lwf": "lwf", "lwf_mc": "lwf-mc", "ilt": "ilt",
    "ewc": "ewc", "pi": "pi", "rw": "rw", "mib": "mib",
}  # fmt: skip
ADAPTERS = {f"chain_{golden}": chain(name, f"chain_{golden}") for golden, name in METHODS.items()}
