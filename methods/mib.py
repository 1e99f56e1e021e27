"""MiB: Modeling the Background for Incremental Learning in Semantic Segmentation (Cermelli et al., CVPR
2020).

Background means something else at each step: in the labels of a step it holds every old class, and in the old
network's output it holds every new one. Three changes to fine-tuning follow: a cross-entropy whose background
is "background or any old class", a distillation whose background is "background or any new class", and a new
classifier that starts from the background's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from bench.lazy import F, torch
from bench.method import IGNORE, Later, Method

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch
    from bench.models.classifier import Classifier


def unbiased_cross_entropy_map(
    logits: Tensor, labels: Tensor, n_old_classes: int, ignore_index: int = IGNORE
) -> Tensor:
    """Cross-entropy in which background stands for all old classes, for each pixel.

    Args:
        logits: [B, C, H, W].
        labels: int64 [B, H, W]; any label below n_old_classes counts as background.
        n_old_classes: channels before this step, background included.
        ignore_index: label that is not learned.

    Returns:
        [B, H, W]; 0 where ignored.

    Source: paper Eq. 5; spec/mib-family.md section 2.2.
    """
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    background = torch.logsumexp(logits[:, :n_old_classes], dim=1, keepdim=True) - total
    log_p = torch.cat([background, logits[:, n_old_classes:] - total], dim=1)
    channel = (labels - n_old_classes + 1).clamp(min=0).masked_fill(labels == ignore_index, ignore_index)
    return F.nll_loss(log_p, channel, ignore_index=ignore_index, reduction="none")


def unbiased_cross_entropy(
    logits: Tensor, labels: Tensor, n_old_classes: int, ignore_index: int = IGNORE
) -> Tensor:
    """The mean of `unbiased_cross_entropy_map` over all pixels, ignored ones included in the divisor."""
    return unbiased_cross_entropy_map(logits, labels, n_old_classes, ignore_index).mean()


def unbiased_distillation_map(logits: Tensor, logits_old: Tensor, alpha: float = 1.0) -> Tensor:
    """Distillation in which the old network's background is matched by background or any new class, for each
    pixel.

    Args:
        logits: [B, C, H, W].
        logits_old: [B, C_old, H, W] with C_old < C.
        alpha: multiplies the old logits.

    Returns:
        [B, H, W]; divided by C_old, as the code (not the paper's Eq. 8) has it.

    Source: spec/mib-family.md section 2.6.
    """
    n_old = logits_old.shape[1]
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    background = (
        torch.logsumexp(torch.cat([logits[:, :1], logits[:, n_old:]], dim=1), dim=1, keepdim=True) - total
    )
    log_q = torch.cat([background, logits[:, 1:n_old] - total], dim=1)
    return -(F.softmax(alpha * logits_old, dim=1) * log_q).mean(dim=1)


def unbiased_distillation(logits: Tensor, logits_old: Tensor, alpha: float = 1.0) -> Tensor:
    """The mean of `unbiased_distillation_map` over all pixels."""
    return unbiased_distillation_map(logits, logits_old, alpha).mean()


def background_classifier_init(classifier: Classifier) -> None:
    """Spread the background's probability equally over background and the new classes.

    Every new row starts as the background's row, and background and new rows share the bias b_0 - log(C_new +
    1).

    Args:
        classifier: a linear classifier whose last head is the new one; changed in place.

    Source: paper Eq. 10; spec/mib-family.md section 3.
    """
    first, new = classifier.heads[0], classifier.heads[-1]
    with torch.no_grad():
        bias = first.bias[0] - math.log(new.bias.numel() + 1)
        new.weight.copy_(first.weight[:1].expand_as(new.weight))
        new.bias.fill_(bias)
        first.bias[0] = bias


class MiB(Method):
    """Unbiased cross-entropy, unbiased distillation, background-based initialisation."""

    title = "MiB"
    paper = "Cermelli, Mancini, Rota Bulò, Ricci and Caputo, CVPR 2020"
    first_step = "ft"

    class Config(Method.Config):
        """Hyper-parameters of MiB."""

        distillation: Later[float] = Field(10.0, ge=0)
        """Weight of the unbiased distillation. The code's preset is 10; the published 15-1 numbers used
        100."""

    def init_classifier(self) -> None:
        background_classifier_init(self.network.classifier)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.step.index:
            return super().losses(batch)
        logits = batch.output.logits
        return {
            "ce": unbiased_cross_entropy(logits, batch.labels, self.step.n_old),
            "kd": self.config.distillation * unbiased_distillation(logits, batch.teacher.logits),
        }
