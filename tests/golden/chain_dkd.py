"""Adapters of the family chain-dkd: DKD and DKD-M."""

import contextlib

from golden_chain import Chain
from golden_chain_deeplab import (
    candidates,
    memory_ids,
    memory_seed,
    our_trunk,
    recorded_dropout,
    tiny_deeplab,
)


class DkdChain(Chain):
    """DKD on a small ResNet of torchvision's make; scored in percent, as the authors print it."""

    settings_of = (
        "first_lr", "lr", "body_lr", "schedule", "warmup", "first_pos_weight", "pos_weight", "distillation",
        "positive", "negative", "auxiliary", "memory_size", "memory_threshold",
    )  # fmt: skip
    other = (
        "dropout",
        "stem",
        "middle_widths",
        "blocks_per_stage",
        "dilations",
        "head_width",
        "aspp_dilations",
        "memory_seed",
    )
    convention, scale = "eir", 100.0

    def kind(self):
        kind = tiny_deeplab(self.p, self.p["blocks_per_stage"], "auxiliary", extra=True)
        body = kind.body()
        spread = [[block.conv2.dilation[0] for block in getattr(body, f"layer{i}")] for i in (1, 2, 3, 4)]
        if spread != self.p["dilations"]:
            raise ValueError(f"dilations {self.p['dilations']} are not torchvision's {spread}")
        return kind

    def ours(self, name):
        return f"classifier.heads.{name.removeprefix('cls.')}" if name.startswith("cls.") else our_trunk(name)

    def seed(self):
        return memory_seed(self.p)

    def settings(self, index):
        return {"first_body_lr": self.p["body_lr"], "label_rule": "eir"}

    def data(self, index):
        return (
            {"candidates": candidates(self.x, index, self.p["batch_size"])}
            if index and "memory_size" in self.p
            else {}
        )

    def stand_ins(self, index, session):
        if index:  # later steps drop nothing
            return contextlib.nullcontext()
        return recorded_dropout(session.method.network, self.x["dropout_masks_step_0"])

    def outputs(self, index, session, begun):
        return {"memory_ids": memory_ids(session)} if index and "memory_size" in self.p else {}


ADAPTERS = {
    "chain_dkd": lambda x, p: DkdChain("dkd", x, p).run(),
    "chain_dkd_m": lambda x, p: DkdChain("dkd@m", x, p).run(),
}
