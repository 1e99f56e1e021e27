"""EWC: Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017), in the online form of MiB's authors.

The importance of a parameter is the Fisher information, a running mean of the squared gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bench.lazy import torch
from bench.method import Recorder, Regularised, Tensors, min_max_normalised

if TYPE_CHECKING:
    from torch import Tensor


class OnlineFisher(Recorder):
    """F <- alpha g^2 + (1 - alpha) F, from ones; alpha weighs the NEW value, so the last iterations dominate.

    Source: spec/mib-family.md section 4.1.
    """

    name = "fisher"
    kinds: ClassVar[tuple[str, ...]] = ("running",)

    def begin(self, parameters: Tensors, previous: Mapping[str, Any]) -> None:
        before = self.saved("running", previous)
        self.fill(
            "running",
            {p: before[p].clone() if p in before else torch.ones_like(v) for p, v in parameters.items()},
        )

    def update(self, gradients: Tensors, parameters: Tensors) -> None:
        g, alpha = list(gradients.values()), self.settings["alpha"]
        fisher = self.listed("running", gradients)
        torch._foreach_mul_(fisher, 1 - alpha)
        torch._foreach_add_(fisher, torch._foreach_mul(g, g), alpha=alpha)

    def finish(self, parameters: Tensors) -> None:
        pass

    @classmethod
    def importance(cls, previous: Mapping[str, Any], normalise: bool = True) -> dict[str, Tensor]:
        """The Fisher information of each parameter, as a penalty weighs it."""
        return {
            p: min_max_normalised(f) if normalise else f for p, f in cls.saved("running", previous).items()
        }


class EWC(Regularised):
    """A penalty weighted by the Fisher information of the steps before."""

    title = "EWC"
    paper = "Kirkpatrick et al., PNAS 2017; settings of Cermelli et al., CVPR 2020"
    recorders = (OnlineFisher,)

    class Config(Regularised.Config):
        """Hyper-parameters of EWC."""

        fisher_alpha: float = Field(0.9, ge=0, le=1)
        """Weight of the new squared gradient in the running mean; also while step 0 records it."""

    @classmethod
    def recorder_settings(cls, config: Any) -> dict[str, dict[str, Any]]:
        return {"fisher": {"alpha": config.fisher_alpha}}

    @classmethod
    def importance_of(cls, previous: Mapping[str, Any], normalise: bool = True) -> dict[str, Tensor]:
        return OnlineFisher.importance(previous, normalise)
