"""A segmentation network: body, head, and a classifier that grows; the usual form of a network."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.lazy import at_least_float32
from bench.models.classifier import Classifier


@dataclass
class Output:
    """What one forward pass yields.

    Attributes:
        logits: [B, C, H, W], upsampled to the image.
        small_logits: [B, C, h, w], as the classifier made them.
        maps: one feature map a stage of the body, for distillation.
        body: the body's output, [B, D, h, w].
        features: the head's output, [B, d, h, w].
        extra: what a particular classifier offers besides.
    """

    logits: Tensor
    small_logits: Tensor
    maps: list[Tensor]
    body: Tensor
    features: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Trunk:
    """What comes before dropout: once its norms are frozen, it is the same in training and in evaluation.

    Attributes:
        size: (H, W) of the padded images.
        body, maps: as in `Output`.
        head: what the head makes of it before its dropout; None for a head that has another form in training.
    """

    size: tuple[int, ...]
    body: Tensor
    maps: list[Tensor]
    head: Tensor | None


class Network(nn.Module):
    """Body, head and classifier behind one interface. It grows by `network.classifier.grow(size)`.

    Attributes:
        shares_trunk: what body and head make of images is what another network's make of them (see
            `with_shared_trunk`).
    """

    shares_trunk = False

    def __init__(self, body: nn.Module, head: nn.Module, classifier: Classifier) -> None:
        super().__init__()
        self.body, self.head, self.classifier = body, head, classifier

    def forward(self, images: Tensor, trunk: Trunk | None = None) -> Output:
        """What the network makes of images [B, 3, H, W]; `trunk` is what `trunk` made of them, if known."""
        height, width = images.shape[-2:]
        if trunk is None:
            padded = pad_to_multiple(images, getattr(self.body, "multiple", 1))
            size: tuple[int, ...] = padded.shape[-2:]
            body, maps = self.body(padded)
        else:
            size, body, maps = trunk.size, trunk.body, trunk.maps
        if trunk is None or trunk.head is None:
            features = self.head(body)
        else:
            head: Any = self.head
            features = head.after_dropout(trunk.head)
        small, extra = self.classifier(features)
        logits = upsample(small, size)[..., :height, :width]
        return Output(logits, small, maps, body, features, extra)

    def trunk(self, images: Tensor) -> Trunk:
        """What comes before dropout, of images [B, 3, H, W]."""
        padded = pad_to_multiple(images, getattr(self.body, "multiple", 1))
        body, maps = self.body(padded)
        first = getattr(self.head, "before_dropout", None)
        return Trunk(padded.shape[-2:], body, maps, None if first is None else first(body))


def with_shared_trunk(network: Network) -> Network:
    """A copy in evaluation mode that holds the very tensors of the network's body and head, and its own
    classifier.

    For a network whose body and head, norms among them, learn nothing more: what they make of images is then
    computed once for both (`Batch`), unless its body has another form in training (`steady` says that it has
    not: no dropout, no stochastic depth).
    """
    shared = [*network.body.parameters(), *network.body.buffers()]
    shared += [*network.head.parameters(), *network.head.buffers()]
    copied = copy.deepcopy(network, {id(tensor): tensor for tensor in shared}).eval()
    copied.shares_trunk = bool(getattr(network.body, "steady", False))
    return copied


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images [B, 3, H, W] padded with 0 on the right and below to sides that a body of patches can cut up."""
    bottom, right = (-side % multiple for side in images.shape[-2:])
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images


def upsample(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits [B, C, h, w] at the image's size, bilinear, corners not aligned, in at least float32."""
    return F.interpolate(at_least_float32(logits), size=size[-2:], mode="bilinear", align_corners=False)
