"""One batch on the device, and what the networks make of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench.data.augment import MEAN, STD
from bench.errors import TrainingError


class Batch:
    """One batch on the device. Each network sees it at most once: both outputs are computed when first asked
    for.

    What an output is, is the network's affair: `bench.models.network.Output` for the networks of the harness.

    Attributes:
        images: float [B, 3, H, W], normalised; float32, or float64 in that precision.
        labels: int64 [B, H, W].
        extra: what else the loader yields by name: named maps such as "saliency" uint8 [B, H, W]; "classes"
            bool [B, C], which of the network's classes the whole image shows as this step labels it;
            "replayed" bool [B].
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        network: nn.Module,
        teacher: nn.Module | None,
        extra: Mapping[str, Tensor] | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self.images, self.labels, self.extra = images, labels, dict(extra or {})
        self._network, self._teacher, self._autocast = network, teacher, autocast

    @cached_property
    def _trunk(self) -> tuple[Any, ...]:
        """What both networks begin with, where the teacher shares the trunk (`with_shared_trunk`)."""
        if self._teacher is None or not getattr(self._teacher, "shares_trunk", False):
            return ()
        teacher: Any = self._teacher
        with torch.no_grad(), self._autocast():
            return (teacher.trunk(self.images),)

    @cached_property
    def output(self) -> Any:
        """Of the network being trained."""
        with self._autocast():
            return self._network(self.images, *self._trunk)

    @cached_property
    def teacher(self) -> Any:
        """Of the frozen network of the previous step; without a graph."""
        if self._teacher is None:
            raise TrainingError("there is no teacher: this is step 0, or the method says that it needs none")
        with torch.no_grad(), self._autocast():
            return self._teacher(self.images, *self._trunk)

    def in_full_precision(self) -> Batch:
        """The same batch, its outputs computed without mixed precision."""
        return Batch(self.images, self.labels, self._network, self._teacher, self.extra)

    def replaced(self, images: Tensor, labels: Tensor | None = None) -> Batch:
        """Another batch of the same step: nothing computed for this one carries over."""
        labels = self.labels if labels is None else labels
        return Batch(images, labels, self._network, self._teacher, self.extra, self._autocast)


def normalise(
    images: Tensor,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 [B, H, W, 3] to `dtype` [B, 3, H, W] with a mean and deviation of each colour, ImageNet's by
    default."""
    shift, scale = (torch.tensor(v, device=images.device, dtype=dtype).view(1, 3, 1, 1) for v in (mean, std))
    return images.permute(0, 3, 1, 2).to(dtype).div(255).sub(shift).div(scale)
