"""RW: Riemannian Walk (Chaudhry et al., ECCV 2018), as MiB's authors carried it to segmentation.

Fisher information as in EWC, and a score of how much a parameter's movement lowered the loss per distance in the Riemannian metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from bench.lazy import torch
from bench.recipe import Later
from bench.regulariser import Regularised, Tensors, min_max_normalised
from methods.ewc import OnlineFisher

if TYPE_CHECKING:
    from torch import Tensor


class RiemannianWalk(OnlineFisher):
    """At every `walk_interval`-th iteration S += g (last - theta) / (0.5 F (theta - last)^2 + 1e-8), with F before its update.

    At the end max(0, S); where an older score exists, the mean of the two.

    Source: spec/mib-family.md section 4.3.
    """

    name = "rw"
    kinds = ("fisher", "score")

    def begin(self, parameters: Tensors, previous: Mapping[str, Any]) -> None:
        super().begin(parameters, previous)
        self.fill("walk", {p: torch.zeros_like(v) for p, v in parameters.items()})
        self.fill("score", self.saved("score", previous))
        self.state["rw.calls"] = 0

    def update(self, gradients: Tensors, parameters: Tensors) -> None:
        if self.state["rw.calls"] % self.config.walk_interval == 0:
            self._walk(gradients, parameters)
        self.state["rw.calls"] += 1
        super().update(gradients, parameters)

    def _walk(self, gradients: Tensors, parameters: Tensors) -> None:
        for p, now in parameters.items():
            last = self.state.get(self.key("last", p))
            if last is None:
                self.state[self.key("last", p)] = now.clone()
                continue
            distance = 0.5 * self.state[self.key("fisher", p)] * (now - last).square() + 1e-8
            self.state[self.key("walk", p)] += gradients[p] * (last - now) / distance
            last.copy_(now)

    def finish(self, parameters: Tensors) -> None:
        for p in parameters:
            score = self.state[self.key("walk", p)].clamp(min=0)
            older = self.state.get(self.key("score", p))
            self.state[self.key("score", p)] = score if older is None else 0.5 * (score + older)
        for kind in ("walk", "last"):
            self.drop(kind)
        del self.state["rw.calls"]

    @classmethod
    def importance(cls, previous: Mapping[str, Any], normalise: bool = True) -> dict[str, Tensor]:
        score = cls.saved("score", previous)
        fisher = super().importance(previous, normalise)
        return {p: fisher[p] + (min_max_normalised(score[p]) if normalise else score[p]) for p in score}


class RW(Regularised):
    """A penalty weighted by Fisher information plus walk score."""

    title = "RW"
    paper = "Chaudhry, Dokania, Ajanthan and Torr, ECCV 2018; settings of Cermelli et al., CVPR 2020"
    recorder = RiemannianWalk

    class Config(Regularised.Config):
        """Hyper-parameters of RW."""

        importance: Later[float] = Field(100.0, ge=0)
        """Weight of the penalty."""
        fisher_alpha: float = Field(0.9, ge=0, le=1)
        """Weight of the new squared gradient in the running Fisher; also while step 0 records it."""
        walk_interval: int = Field(10, ge=1)
        """Iterations between two updates of the walk score; also while step 0 records it."""
