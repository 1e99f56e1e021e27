"""RW: Riemannian Walk (Chaudhry et al., ECCV 2018), as MiB's authors carried it to segmentation.

Fisher information as in EWC, and a score of how much a parameter's movement lowered the loss per distance in
the Riemannian metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bench.lazy import torch
from bench.method import Later, Recorder, Regularised, Tensors, min_max_normalised
from methods.ewc import OnlineFisher

if TYPE_CHECKING:
    from torch import Tensor


class RiemannianWalk(Recorder):
    """At every `interval`-th iteration S += g (last - theta) / (0.5 F (theta - last)^2 + 1e-8), with F before
    its update.

    At the end max(0, S); where an older score exists, the mean of the two. F is what OnlineFisher keeps in
    the same state; it is updated after this.

    Source: spec/mib-family.md section 4.3.
    """

    name = "walk"
    kinds: ClassVar[tuple[str, ...]] = ("score",)

    def begin(self, parameters: Tensors, previous: Mapping[str, Any]) -> None:
        self.fill("path", {p: torch.zeros_like(v) for p, v in parameters.items()})
        self.fill("score", self.saved("score", previous))
        self.state["walk.calls"] = 0

    def update(self, gradients: Tensors, parameters: Tensors) -> None:
        if self.state["walk.calls"] % self.settings["interval"] == 0:
            self._walk(gradients, parameters)
        self.state["walk.calls"] += 1

    def _walk(self, gradients: Tensors, parameters: Tensors) -> None:
        for p, now in parameters.items():
            last = self.state.get(self.key("last", p))
            if last is None:
                self.state[self.key("last", p)] = now.clone()
                continue
            distance = 0.5 * self.state[OnlineFisher.key("running", p)] * (now - last).square() + 1e-8
            self.state[self.key("path", p)] += gradients[p] * (last - now) / distance
            last.copy_(now)

    def finish(self, parameters: Tensors) -> None:
        for p in parameters:
            score = self.state[self.key("path", p)].clamp(min=0)
            older = self.state.get(self.key("score", p))
            self.state[self.key("score", p)] = score if older is None else 0.5 * (score + older)
        for kind in ("path", "last"):
            self.drop(kind)
        del self.state["walk.calls"]


class RW(Regularised):
    """A penalty weighted by Fisher information plus walk score."""

    title = "RW"
    paper = "Chaudhry, Dokania, Ajanthan and Torr, ECCV 2018; settings of Cermelli et al., CVPR 2020"
    recorders = (
        RiemannianWalk,
        OnlineFisher,
    )  # the walk reads the Fisher information as it was before the iteration

    class Config(Regularised.Config):
        """Hyper-parameters of RW."""

        importance: Later[float] = Field(100.0, ge=0)
        """Weight of the penalty."""
        fisher_alpha: float = Field(0.9, ge=0, le=1)
        """Weight of the new squared gradient in the running Fisher; also while step 0 records it."""
        walk_interval: int = Field(10, ge=1)
        """Iterations between two updates of the walk score; also while step 0 records it."""

    @classmethod
    def recorder_settings(cls, config: Any) -> dict[str, dict[str, Any]]:
        return {"walk": {"interval": config.walk_interval}, "fisher": {"alpha": config.fisher_alpha}}

    @classmethod
    def importance_of(cls, previous: Mapping[str, Any], normalise: bool = True) -> dict[str, Tensor]:
        score = RiemannianWalk.saved("score", previous)
        fisher = OnlineFisher.importance(previous, normalise)
        if not fisher:
            return {}
        return {p: fisher[p] + (min_max_normalised(s) if normalise else s) for p, s in score.items()}
