"""LwF-MC: Learning without Forgetting, multi-class (Rebuffi et al., CVPR 2017: iCaRL without exemplars), in
MiB's form.

Every class is a binary problem of its own, background among them, from step 0 on: its step 0 is shared with
no other method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bench.lazy import F, torch
from bench.method import IGNORE, Later, Method

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch


def bce_with_logits_ignore_map(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Binary cross-entropy of one-hot labels, summed over classes, for each pixel.

    Args:
        logits: [B, C, H, W].
        labels: int64 [B, H, W].
        ignore_index: label that is not learned.

    Returns:
        [B, H, W]; 0 where ignored.

    Source: spec/mib-family.md section 2.4.
    """
    valid = labels != ignore_index
    targets = F.one_hot(labels.where(valid, 0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1) * valid


def bce_with_logits_ignore(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """The mean of `bce_with_logits_ignore_map` over all pixels, ignored ones included in the divisor."""
    return bce_with_logits_ignore_map(logits, labels, ignore_index).mean()


def binary_distillation(logits: Tensor, logits_old: Tensor) -> Tensor:
    """Binary cross-entropy against the old network's sigmoid scores, summed over old classes, mean over all
    pixels.

    Args:
        logits: [B, C, H, W].
        logits_old: [B, C_old, H, W].
    """
    scores = torch.sigmoid(logits_old)
    new = logits[:, : logits_old.shape[1]]
    return logits_old.shape[1] * F.binary_cross_entropy_with_logits(new, scores)


def icarl_disjoint_loss(
    logits: Tensor,
    labels: Tensor,
    logits_old: Tensor,
    keep_background_from_labels: bool = False,
    ignore_index: int = IGNORE,
) -> Tensor:
    """One binary cross-entropy whose targets on the old channels are the old network's scores. MiB's option
    --icarl_disjoint.

    Args:
        logits: [B, C, H, W].
        labels: int64 [B, H, W].
        logits_old: [B, C_old, H, W].
        keep_background_from_labels: background's target comes from the labels (--icarl_bkg).
        ignore_index: a label that is no class: a negative of every new one.

    Returns:
        A scalar: sum over classes, mean over all pixels; no pixel is ignored.
    """
    n_old, first = logits_old.shape[1], int(keep_background_from_labels)
    labelled = (
        F.one_hot(labels.where(labels != ignore_index, 0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    )
    labelled = labelled * (labels != ignore_index).unsqueeze(1)
    targets = torch.cat(
        [labelled[:, :first], torch.sigmoid(logits_old)[:, first:], labelled[:, n_old:]], dim=1
    )
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1).mean()


class LwFMC(Method):
    """Binary cross-entropy on the labels and on the old network's scores; old channels get both,
    contradictory as they are."""

    title = "LwF-MC"
    paper = "Rebuffi, Kolesnikov, Sperl and Lampert, CVPR 2017; settings of Cermelli et al., CVPR 2020"

    class Config(Method.Config):
        """Hyper-parameters of LwF-MC."""

        distillation: Later[float] = Field(10.0, ge=0)
        """Weight of the distillation, a sum over old classes."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        logits = batch.output.logits
        terms = {"bce": bce_with_logits_ignore(logits, batch.labels)}
        if self.step.index:
            terms["kd"] = self.config.distillation * binary_distillation(logits, batch.teacher.logits)
        return terms
