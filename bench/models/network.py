"""A segmentation network: body, head, and a classifier that grows; the usual form of a network."""

from __future__ import annotations

from dataclasses import dataclass, field

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


class Network(nn.Module):
    """Body, head and classifier behind one interface. It grows by `network.classifier.grow(size)`."""

    def __init__(self, body: nn.Module, head: nn.Module, classifier: Classifier) -> None:
        super().__init__()
        self.body, self.head, self.classifier = body, head, classifier

    def forward(self, images: Tensor) -> Output:
        height, width = images.shape[-2:]
        images = pad_to_multiple(images, getattr(self.body, "multiple", 1))
        body, maps = self.body(images)
        features = self.head(body)
        small, extra = self.classifier(features)
        logits = upsample(small, images.shape[-2:])[..., :height, :width]
        return Output(logits, small, maps, body, features, extra)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images [B, 3, H, W] padded with 0 on the right and below to sides that a body of patches can cut up."""
    bottom, right = (-side % multiple for side in images.shape[-2:])
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images


def upsample(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits [B, C, h, w] at the image's size, bilinear, corners not aligned, in at least float32."""
    return F.interpolate(at_least_float32(logits), size=size[-2:], mode="bilinear", align_corners=False)
