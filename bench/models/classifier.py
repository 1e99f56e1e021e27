"""Classifiers that grow by one block a step. Blocks keep the order of the steps, and so do their channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.heads import kaiming


class Classifier(nn.Module):
    """A list of heads, one a block of classes. `forward` maps features [B, D, h, w] to logits and to what else a head offers.

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

    def grow(self, size: int) -> None:
        """Append a freshly initialised head of `size` channels."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.cat([head(features) for head in self.heads], dim=1), {}


class LinearClassifier(Classifier):
    """One 1x1 convolution with bias a step (MiB, PLOP, NeST): head 0 holds background and the first classes."""

    def grow(self, size: int) -> None:
        device = next(self.parameters()).device if len(self.heads) else None
        self.heads.append(nn.Conv2d(self.channels, size, 1, device=device))

    @property
    def sizes(self) -> list[int]:
        return [head.weight.shape[0] for head in self.heads]


class ConvHeads(Classifier):
    """One head of 3x3 convolution, norm, ReLU and 1x1 convolution a block (SSUL).

    Args:
        norm: builds the norm with its activation; batch norm and ReLU by default.
    """

    def __init__(self, channels: int, sizes: Sequence[int] = (), norm: Callable[[int], list[nn.Module]] | None = None) -> None:
        self.norm = norm or (lambda width: [nn.BatchNorm2d(width), nn.ReLU()])
        super().__init__(channels, sizes)

    def grow(self, size: int) -> None:
        head = nn.Sequential(
            nn.Conv2d(self.channels, self.channels, 3, padding=1, bias=False), *self.norm(self.channels), nn.Conv2d(self.channels, size, 1)
        )
        kaiming(head)
        if len(self.heads):
            head.to(next(self.parameters()).device)
        self.heads.append(head)

    @property
    def sizes(self) -> list[int]:
        return [head[-1].weight.shape[0] for head in self.heads]


class AuxiliaryClassifier(LinearClassifier):
    """1x1 convolutions with bias for the foreground only, behind an auxiliary one of a single channel (DKD, EIR).

    Channel 0 is the auxiliary head's. It reads detached features, so that its loss never reaches the trunk; channel k is the
    k-th class. Beside the logits come "positive" and "negative" [B, C-1, h, w]: what the positive and the negative part of each
    foreground weight make of the features, without the bias.

    Source: spec/eir.md section 1.
    """

    def grow(self, size: int) -> None:
        super().grow(size)
        kaiming(self.heads[-1])

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        auxiliary, *foreground = self.heads
        logits = torch.cat([auxiliary(features.detach()), *(head(features) for head in foreground)], dim=1)
        weight = torch.cat([head.weight for head in foreground])
        return logits, {"positive": F.conv2d(features, weight.clamp(min=0)), "negative": F.conv2d(features, weight.clamp(max=0))}


def align_classifier_norm(weight: Tensor, classes_per_step: Sequence[int], align_type: str = "all") -> Tensor:
    """Rows of the newest head scaled by one factor, so that their mean norm is that of the old rows.

    Args:
        weight: [C, D], rows in step order.
        classes_per_step: rows of each head, the newest last.
        align_type: which old rows count: "all", "old" (without background), or "background" (of step 0 the background row only).

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
