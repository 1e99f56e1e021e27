"""EWC: Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017), in the online form of MiB's authors.

The importance of a parameter is the Fisher information, a running mean of the squared gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bench.lazy import torch
from bench.regulariser import Recorder, Regularised, Tensors, min_max_normalised

if TYPE_CHECKING:
    from torch import Tensor


class OnlineFisher(Recorder):
    """F <- alpha g^2 + (1 - alpha) F, from ones; alpha weighs the NEW value, so the last iterations dominate.

    Source: spec/mib-family.md section 4.1.
    """

    name = "ewc"
    kinds: ClassVar[tuple[str, ...]] = ("fisher",)

    def begin(self, parameters: Tensors, previous: Mapping[str, Any]) -> None:
        before = self.saved("fisher", previous)
        self.fill("fisher", {p: before[p].clone() if p in before else torch.ones_like(v) for p, v in parameters.items()})

    def update(self, gradients: Tensors, parameters: Tensors) -> None:
        g = list(gradients.values())
        fisher = self.listed("fisher", gradients)
        torch._foreach_mul_(fisher, 1 - self.config.fisher_alpha)
        torch._foreach_add_(fisher, torch._foreach_mul(g, g), alpha=self.config.fisher_alpha)

    def finish(self, parameters: Tensors) -> None:
        pass

    @classmethod
    def importance(cls, previous: Mapping[str, Any], normalise: bool = True) -> dict[str, Tensor]:
        return {p: min_max_normalised(f) if normalise else f for p, f in cls.saved("fisher", previous).items()}


class EWC(Regularised):
    """A penalty weighted by the Fisher information of the steps before."""

    title = "EWC"
    paper = "Kirkpatrick et al., PNAS 2017; settings of Cermelli et al., CVPR 2020"
    recorder = OnlineFisher

    class Config(Regularised.Config):
        """Hyper-parameters of EWC."""

        fisher_alpha: float = Field(0.9, ge=0, le=1)
        """Weight of the new squared gradient in the running mean; also while step 0 records it."""
