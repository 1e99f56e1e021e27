"""The loss that every method of the MiB family starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.data.dataset import IGNORE
from bench.lazy import F

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Softmax cross-entropy, averaged over all pixels: ignored ones add nothing to the sum but count in the
    divisor.

    Args:
        logits: float [B, C, H, W].
        labels: int64 [B, H, W].
        ignore_index: label that is not learned.

    Returns:
        A scalar; 0 if every pixel is ignored.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 2, 1, 2), torch.tensor([[[1, 255]]])
        >>> round(cross_entropy(logits, labels).item(), 4)  # log(2) / 2: the ignored pixel counts
        0.3466

    Source: spec/mib-family.md section 2.1 (the trainer takes the plain mean of the unreduced loss map).
    """
    return cross_entropy_map(logits, labels, ignore_index).mean()


def cross_entropy_map(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Cross-entropy of each pixel, float [B, H, W]; 0 where ignored.

    Example:
        >>> import torch
        >>> cross_entropy_map(torch.zeros(1, 2, 1, 2), torch.tensor([[[1, 255]]]))
        tensor([[[0.6931, 0.0000]]])
    """
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
