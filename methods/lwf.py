"""LwF: Learning without Forgetting (Li and Hoiem, ECCV 2016), as MiB's authors carried it to segmentation.

Fine-tuning, and a distillation term that keeps the new network's probabilities over the old classes near the
old network's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bench.lazy import F
from bench.method import Later, Method

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch


def knowledge_distillation(logits: Tensor, logits_old: Tensor, alpha: float = 1.0) -> Tensor:
    """Cross-entropy between old and new probabilities over the old classes.

    Args:
        logits: [B, C, H, W]; the softmax runs over the first C_old channels only.
        logits_old: [B, C_old, H, W], background included.
        alpha: multiplies the old logits.

    Returns:
        A scalar: mean over classes, then over all pixels; no pixel is ignored.

    Source: spec/mib-family.md section 2.3.
    """
    return knowledge_distillation_map(logits, logits_old, alpha).mean()


def knowledge_distillation_map(logits: Tensor, logits_old: Tensor, alpha: float = 1.0) -> Tensor:
    """The same for each pixel, [B, H, W]."""
    log_new = F.log_softmax(logits[:, : logits_old.shape[1]], dim=1)
    return -(F.softmax(alpha * logits_old, dim=1) * log_new).mean(dim=1)


class LwF(Method):
    """Cross-entropy and distillation of the old classes' probabilities."""

    title = "LwF"
    paper = "Li and Hoiem, ECCV 2016; settings of Cermelli et al., CVPR 2020"
    first_step = "ft"

    class Config(Method.Config):
        """Hyper-parameters of LwF."""

        distillation: Later[float] = Field(100.0, ge=0)
        """Weight of the distillation; the loss is a mean over old classes, so this is 100 / C_old a pixel."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().losses(batch)
        if self.step.index:
            terms["kd"] = self.config.distillation * knowledge_distillation(
                batch.output.logits, batch.teacher.logits
            )
        return terms
