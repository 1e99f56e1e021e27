"""Adapters of the family chain-ssul: SSUL, SSUL-M, and SSUL's selection of the best iterate."""

import contextlib
from unittest import mock

import torch
from golden_chain import Chain, all_used
from golden_chain_deeplab import (
    candidates,
    memory_ids,
    memory_seed,
    our_trunk,
    recorded_dropout,
    tiny_deeplab,
)
from golden_common import t

from bench.method import replay

BACKGROUND_HEAD = "classifier.head.1."


class SsulChain(Chain):
    """SSUL on a small ResNet of torchvision's make."""

    settings_of = (
        "first_lr", "first_body_lr", "lr", "background_lr", "schedule", "min_lr", "warmup", "threshold",
        "saliency", "unknown", "memory_size", "memory_labels",
    )  # fmt: skip
    other = (
        "dropout",
        "stem",
        "middle_widths",
        "head_width",
        "aspp_dilations",
        "blocks_per_stage",
        "memory_seed",
    )
    convention = "ssul"

    def kind(self):
        return tiny_deeplab(self.p, self.p.get("blocks_per_stage", 1), "conv-heads")

    def ours(self, name):
        if name.startswith("classifier.head."):
            return f"classifier.heads.{name.removeprefix('classifier.head.')}"
        return our_trunk(name, "classifier.")

    def seed(self):
        return memory_seed(self.p)

    def settings(self, index):
        return {"label_rule": "ssul"}

    def maps(self, index):
        return {"saliency": self.x[f"saliency_step_{index}"]} if self.p["saliency"] == "files" else {}

    def data(self, index):
        if not index or "memory_size" not in self.p:
            return {}
        images, labels = (t(self.x[f"memory_{kind}_step_{index}"]) for kind in ("images", "labels"))
        memory = [
            {"images": i, "labels": y, "saliency": torch.zeros_like(y)}
            for i, y in zip(images, labels, strict=True)
        ]
        salient = (
            {"saliency": t(self.x[f"candidate_saliency_step_{index}"])}
            if self.p["saliency"] == "files"
            else {}
        )
        return {"memory": memory, "candidates": candidates(self.x, index, self.p["batch_size"], **salient)}

    @contextlib.contextmanager
    def stand_ins(self, index, session):
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                recorded_dropout(session.method.network, self.x[f"dropout_masks_step_{index}"])
            )
            if index and "memory_size" in self.p:
                rows = iter(t(self.x[f"replaced_rows_step_{index}"]))
                stack.enter_context(
                    mock.patch.object(replay, "drawn_order", lambda n, rng: whole_order(next(rows), n))
                )
                stack.enter_context(all_used(rows))
            yield

    def outputs(self, index, session, begun):
        found = {}
        if index:
            names = self.names(session)
            sizes = [session.method.network.state_dict()[name].numel() for _, name in names]
            change = (self.taken(session, names) - begun).split(sizes)
            of_head = [
                part
                for part, (theirs, _) in zip(change, names, strict=True)
                if theirs.startswith(BACKGROUND_HEAD)
            ]
            found["background_head_change"] = 10000 * torch.cat(of_head)
            if "memory_size" in self.p:
                found["memory_ids"] = memory_ids(session)
        return found


def whole_order(replaced, n):
    """A permutation of n rows whose first half is replaced."""
    if len(replaced) != n // 2:
        raise ValueError(f"{len(replaced)} of {n} rows are replaced, not half")
    others = [row for row in range(n) if row not in replaced.tolist()]
    return torch.tensor([*replaced.tolist(), *others])


def chain(name):
    return lambda x, p: SsulChain(name, x, p).run()


ADAPTERS = {
    "chain_ssul": chain("ssul"),
    "chain_ssul_m": chain("ssul-m"),
    "chain_ssul_selection": chain("ssul"),
}
