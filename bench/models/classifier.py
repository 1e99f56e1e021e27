"""Classifiers that grow by one block a step. Blocks keep the order of the steps, and so do their channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.heads import kaiming


class Classifier(nn.Module):
    """A list of heads, one a block of classes.

    `forward` maps features [B, D, h, w] to logits and to what else a head offers. A kind of classifier says
    what a head is (`new_head`) and how large each one is (`sizes`).

    Args:
        channels: D.
        sizes: channels of each head.
    """

    heads: Any
    """A module list; what a head is made of is the subclass's affair."""

    def __init__(self, channels: int, sizes: Sequence[int] = ()) -> None:
        super().__init__()
        self.channels = channels
        self.heads = nn.ModuleList()
        for size in sizes:
            self.grow(size)

    @property
    def sizes(self) -> list[int]:
        """Channels of each head."""
        raise NotImplementedError

    def new_head(self, size: int) -> nn.Module:
        """A freshly initialised head of `size` channels, on the CPU in single precision."""
        raise NotImplementedError

    def grow(self, size: int) -> None:
        """Append a freshly initialised head of `size` channels, with device and precision of those before it.

        It is drawn before it is moved: the same seed gives the same head in float32 and in float64.
        """
        head = self.new_head(size)
        like = next(self.heads.parameters(), None)
        if like is not None:
            head.to(like.device, like.dtype)
        self.heads.append(head)

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.cat([head(features) for head in self.heads], dim=1), {}


class LinearClassifier(Classifier):
    """One 1x1 convolution with bias a step (MiB, PLOP, NeST): head 0 is background and the first classes."""

    def new_head(self, size: int) -> nn.Module:
        return nn.Conv2d(self.channels, size, 1)

    @property
    def sizes(self) -> list[int]:
        return [head.weight.shape[0] for head in self.heads]


class ConvHeads(Classifier):
    """One head of 3x3 convolution, norm, ReLU and 1x1 convolution a block (SSUL).

    Args:
        norm: builds the norm with its activation; batch norm and ReLU by default.
    """

    def __init__(
        self, channels: int, sizes: Sequence[int] = (), norm: Callable[[int], list[nn.Module]] | None = None
    ) -> None:
        self.norm = norm or (lambda width: [nn.BatchNorm2d(width), nn.ReLU()])
        super().__init__(channels, sizes)

    def new_head(self, size: int) -> nn.Module:
        wide = nn.Conv2d(self.channels, self.channels, 3, padding=1, bias=False)
        head = nn.Sequential(wide, *self.norm(self.channels), nn.Conv2d(self.channels, size, 1))
        kaiming(head)
        return head

    @property
    def sizes(self) -> list[int]:
        return [head[-1].weight.shape[0] for head in self.heads]


class ForegroundClassifier(LinearClassifier):
    """1x1 convolutions for the foreground only: channel k is the class k+1 (STAR).

    Source: spec/star.md section 2.
    """

    def new_head(self, size: int) -> nn.Module:
        head = super().new_head(size)
        kaiming(head)
        return head


class AuxiliaryClassifier(ForegroundClassifier):
    """1x1 convolutions for the foreground only, behind an auxiliary one of a single channel (DKD, EIR).

    Channel 0 is the auxiliary head's. It reads detached features, so that its loss never reaches the trunk;
    channel k is the k-th class. Beside the logits come "positive" and "negative" [B, C-1, h, w]: what the
    positive and the negative part of each foreground weight make of the features, without the bias.

    Source: spec/eir.md section 1.
    """

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        auxiliary, *foreground = self.heads
        logits = torch.cat([auxiliary(features.detach()), *(head(features) for head in foreground)], dim=1)
        weight = torch.cat([head.weight for head in foreground])
        positive, negative = (F.conv2d(features, part) for part in (weight.clamp(min=0), weight.clamp(max=0)))
        return logits, {"positive": positive, "negative": negative}


def align_classifier_norm(weight: Tensor, classes_per_step: Sequence[int], align_type: str = "all") -> Tensor:
    """Rows of the newest head scaled by one factor, so that their mean norm is that of the old rows.

    Args:
        weight: [C, D], rows in step order.
        classes_per_step: rows of each head, the newest last.
        align_type: which old rows count: "all", "old" (without background), or "background" (of step 0 the
            background row only).

    Returns:
        [C, D]; old rows unchanged.

    Source: spec/plop.md sections 10 and 11 (PLOP's option align_weight); NeST uses "all".
    """
    n_new = classes_per_step[-1]
    old = {
        "all": weight[:-n_new],
        "old": weight[1:-n_new],
        "background": torch.cat([weight[:1], weight[classes_per_step[0] : -n_new]]),
    }[align_type]
    new = weight[-n_new:]
    factor = old.norm(dim=1).mean() / new.norm(dim=1).mean()
    return torch.cat([weight[:-n_new], new * factor])
