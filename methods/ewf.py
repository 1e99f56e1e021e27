"""EWF: Endpoints Weight Fusion for Class Incremental Semantic Segmentation (Xiao et al., CVPR 2023).

EWF wraps another method and changes two things. The old classifier heads are frozen while the wrapped method
trains. When it has trained, each weight that the network already had becomes a mean of what it was before the
step (one endpoint) and after it (the other): the fewer classes the step adds, the more of the old. The fused
network is what is tested, what the next step starts from, and what its teacher is; the new head is as it was
trained.

The released code is followed (spec/ewf.md section 4): running means and variances are fused like weights,
background counts among the old classes, and the bias of the background, which the wrapped method lowers when
a step begins, is fused with what it was before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from bench.lazy import torch
from bench.method import Later, Method

if TYPE_CHECKING:
    from torch import Tensor


def new_share(n_old_classes: int, n_new_classes: int) -> float:
    """How much of a fused weight is the new one.

    Args:
        n_old_classes: before the step, background included.
        n_new_classes: that the step adds.

    Source: spec/ewf.md section 1.
    """
    return math.sqrt(n_new_classes / (n_new_classes + n_old_classes))


def largest_moves(old: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float) -> Tensor:
    """The least |new - old| among the largest floor(share * n), over all n entries of some tensors of the
    same names and shapes; a scalar.

    Source: spec/ewf.md section 2 (threshold_choice).
    """
    moves = torch.cat([(new[name] - before).abs().flatten() for name, before in old.items()])
    n = len(moves)
    return moves.kthvalue(n - max(1, int(share * n)) + 1).values


def fused_weights(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    n_old_classes: int,
    n_new_classes: int,
    fused_share: float = 1.0,
) -> dict[str, Tensor]:
    """A network between two endpoints of its training.

    Args:
        old: floating-point tensors by name, before the step.
        new: after it, those of the new head among them.
        n_old_classes: background included.
        n_new_classes: that the step adds.
        fused_share: of all entries that both have, the share that is fused: those that moved most. The others
            stay as they are in `new`.

    Returns:
        (1 - a) old + a new with a of `new_share`, by the names of `new`; what only `new` has, as it is.

    Source: spec/ewf.md sections 1 and 2.
    """
    a = new_share(n_old_classes, n_new_classes)
    fused = dict(new)
    least = largest_moves(old, new, fused_share) if fused_share < 1 else None
    for name, before in old.items():
        after = new[name]
        mean = (1 - a) * before + a * after
        fused[name] = mean if least is None else torch.where((after - before).abs() < least, after, mean)
    return fused


def floating(module: torch.nn.Module) -> dict[str, Tensor]:
    """Weights and running statistics by name; a norm's count of batches, an integer, is none of them."""
    return {name: t for name, t in module.state_dict().items() if t.is_floating_point()}


class EWF(Method):
    """Any method on a linear classifier, each step's weights fused with those before it."""

    title = "EWF"
    paper = "Xiao, Zhang, Feng, Liu, van de Weijer and Cheng, CVPR 2023"
    wraps = ("linear",)
    needs_teacher = True

    class Config(Method.Config):
        """Hyper-parameters of EWF."""

        fused_share: Later[float] = Field(1.0, gt=0, le=1)
        """Share of the network's entries that is fused, those that moved most; the others keep their new
        value. The option threshold_choice of the code, which no script sets, is 0.45."""

    def setup(self) -> None:
        super().setup()
        if self.step.index:
            self.network.classifier.heads[:-1].requires_grad_(False)

    def end_step(self) -> None:
        """What the wrapped method leaves was measured on the network as it was trained; then the fusion."""
        super().end_step()
        if not self.step.index:
            return
        now = floating(self.network)
        with torch.no_grad():
            fused = fused_weights(
                floating(self.teacher), now, self.step.n_old, self.step.n_new, self.config.fused_share
            )
            for name, value in fused.items():
                now[name].copy_(value)
