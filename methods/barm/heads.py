"""The classifier of BARM: a branch a step, and a background whose score later steps lower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.models.classifier import ConvHeads


def background_score(residuals: Sequence[Tensor], training: bool) -> Tensor:
    """The background's logit: that of step 0, and what each later step takes from it.

    Args:
        residuals: channel 0 of each branch, [B, 1, h, w], in step order.
        training: the newest residual counts as it is, and it alone gets a gradient; else it counts, as all
            others do, where it is negative.

    Source: spec/barm.md section 2.
    """
    first, *later = residuals
    if not later:
        return first
    lowering = [residual.clamp(max=0) for residual in later]
    if not training:
        return torch.stack([first, *lowering]).sum(dim=0)
    return torch.stack([first, *lowering[:-1]]).sum(dim=0).detach() + later[-1]


class ResidualHeads(ConvHeads):
    """One branch of 3x3 convolution, norm, ReLU and 1x1 convolution a step; channel 0 of each is background
    (the first) or a residual of it.

    Logits are [background, classes of all branches]. Beside them come "branches" [B, n, D, h, w], what each
    1x1 convolution reads, and "scores" [B, sum of sizes, h, w], what all of them make of it.

    Source: spec/barm.md section 2.
    """

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        branches = [head[:-1](features) for head in self.heads]
        scores = [head[-1](branch) for head, branch in zip(self.heads, branches, strict=True)]
        background = background_score([score[:, :1] for score in scores], self.training)
        logits = torch.cat([background, *(score[:, 1:] for score in scores)], dim=1)
        return logits, {"branches": torch.stack(branches, dim=1), "scores": torch.cat(scores, dim=1)}
