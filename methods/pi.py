"""PI: Synaptic Intelligence through path integrals (Zenke, Poole and Ganguli, ICML 2017), as MiB's authors
carried it over.

The importance of a parameter is how much its movement lowered the loss over a step, relative to how far it
moved in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from bench.lazy import torch
from bench.method import Recorder, Regularised, Tensors, min_max_normalised

if TYPE_CHECKING:
    from torch import Tensor


class PathIntegral(Recorder):
    """P += g_t (theta before the last update - theta_t); at the end max(0, P / (way^2 + 1e-20)) is added to
    the older score.

    The tiny epsilon gives huge scores to parameters that hardly moved; normalising by the maximum then makes
    most importances nearly 0, which is why PI is near fine-tuning in the published table.

    Source: spec/mib-family.md section 4.2.
    """

    name = "path"
    kinds: ClassVar[tuple[str, ...]] = ("score",)

    def begin(self, parameters: Tensors, previous: Mapping[str, Any]) -> None:
        self.fill("integral", {p: torch.zeros_like(v) for p, v in parameters.items()})
        self.fill("score", self.saved("score", previous))

    def update(self, gradients: Tensors, parameters: Tensors) -> None:
        now = list(parameters.values())
        if self.key("last", next(iter(parameters))) in self.state:
            last = self.listed("last", parameters)
            way = torch._foreach_mul(list(gradients.values()), torch._foreach_sub(last, now))
            torch._foreach_add_(self.listed("integral", parameters), way)
            torch._foreach_copy_(last, now)
        else:  # nothing has moved yet
            for kind in ("start", "last"):
                self.fill(kind, {p: v.clone() for p, v in parameters.items()})

    def finish(self, parameters: Tensors) -> None:
        for p, value in parameters.items():
            way = (value - self.state[self.key("start", p)]).square() + 1e-20
            score = (self.state[self.key("integral", p)] / way).clamp(min=0)
            older = self.state.get(self.key("score", p))
            self.state[self.key("score", p)] = score if older is None else score + older
        for kind in ("integral", "start", "last"):
            self.drop(kind)


class PI(Regularised):
    """A penalty weighted by path-integral importances."""

    title = "PI"
    paper = "Zenke, Poole and Ganguli, ICML 2017; settings of Cermelli et al., CVPR 2020"
    recorders = (PathIntegral,)

    @classmethod
    def importance_of(cls, previous: Mapping[str, Any], normalise: bool = True) -> dict[str, Tensor]:
        saved = PathIntegral.saved("score", previous).items()
        return {p: min_max_normalised(s) if normalise else s for p, s in saved}
