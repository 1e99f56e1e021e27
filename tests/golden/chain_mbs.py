"""Adapters of the family chain-mbs."""

import contextlib

from golden_chain import Chain, all_used
from golden_common import t
from golden_steps import TinyNetwork

from bench.models.vit import MaskTransformer, PatchTokens, VisionTransformer

HEADS = {"cls_emb": "tokens", "mask_norm.weight": "scale", "mask_norm.bias": "shift"}
"""Our names of what a head holds, by the authors'; behind theirs stands the number of the head."""


class MbsChain(Chain):
    """MBS on its vision transformer in small."""

    settings_of = ("first_lr", "lr", "schedule", "threshold", "output_distillation")
    other = (
        "drop_path",
        "image_size",
        "patch",
        "width",
        "hidden",
        "heads",
        "encoder_blocks",
        "decoder_blocks",
    )
    convention = "mbs"

    def kind(self):
        p = self.p

        def classifier(width, sizes):
            inside = {
                "width": p["width"],
                "n_blocks": p["decoder_blocks"],
                "hidden": p["hidden"],
                "drop_path": p["drop_path"],
            }
            return MaskTransformer(width, sizes, p["heads"], **inside)

        return TinyNetwork(
            lambda: VisionTransformer(
                p["image_size"], p["patch"], p["width"], p["encoder_blocks"], p["heads"], p["hidden"]
            ),
            PatchTokens,
            "mask-transformer",
            classifier,
        )

    def ours(self, name):
        module, _, rest = name.partition(".")
        if module == "encoder":
            return f"body.{rest}"
        kind, _, number = rest.rpartition(".")
        return f"classifier.heads.{number}.{HEADS[kind]}" if kind in HEADS else f"classifier.{rest}"

    def settings(self, index):
        return {"label_rule": "mbs"}

    @contextlib.contextmanager
    def stand_ins(self, index, session):
        """What drop path kept in each training pass, in the place of what the decoder's blocks draw."""
        dropping = [block for block in session.method.network.classifier.blocks if block.drop_path]
        masks = self.x[f"drop_path_masks_step_{index}"]
        if masks.shape[1] != 2 * len(dropping):
            raise ValueError(
                f"{masks.shape[1]} masks a pass are recorded, and {len(dropping)} blocks draw two each"
            )
        kept = iter(masks.reshape(-1, masks.shape[-1]))
        for block in dropping:
            block._kept = replayed(block, kept)
        with all_used(kept):
            yield
        for block in dropping:
            del block._kept


def replayed(block, kept):
    """Drop path of a block by recorded masks [passes, batch], two a pass."""

    def keep(x):
        return x * t(next(kept)).to(x.dtype)[:, None, None] / (1 - block.drop_path) if block.training else x

    return keep


ADAPTERS = {"chain_mbs": lambda x, p: MbsChain("mbs", x, p).run()}
