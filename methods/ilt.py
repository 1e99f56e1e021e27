"""ILT: Incremental Learning Techniques for Semantic Segmentation (Michieli and Zanuttigh, ICCV Workshops
2019), in MiB's form.

LwF's distillation of the output, and a squared distance between the bodies' features. The paper's variants
(frozen encoder, output distillation alone) are not what the published tables ran.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bench.lazy import F
from bench.method import Later, Method
from methods.lwf import knowledge_distillation

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch


def feature_distillation_mse(features: Tensor, features_old: Tensor) -> Tensor:
    """Mean squared difference of two feature maps [B, D, h, w]; the old one carries no gradient.

    Source: spec/mib-family.md section 2.5.
    """
    return F.mse_loss(features, features_old)


class ILT(Method):
    """Cross-entropy, distillation of the output and of the body's features."""

    title = "ILT"
    paper = "Michieli and Zanuttigh, ICCV Workshops 2019; settings of Cermelli et al., CVPR 2020"
    first_step = "ft"

    class Config(Method.Config):
        """Hyper-parameters of ILT."""

        distillation: Later[float] = Field(100.0, ge=0)
        """Weight of the output distillation (a mean over old classes)."""
        features: Later[float] = Field(100.0, ge=0)
        """Weight of the feature distance, on the body's output."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().losses(batch)
        if self.step.index:
            new, old = batch.output, batch.teacher
            terms["kd"] = self.config.distillation * knowledge_distillation(new.logits, old.logits)
            terms["features"] = self.config.features * feature_distillation_mse(new.body, old.body)
        return terms
