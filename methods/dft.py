"""DFT*: Direct Fine-Tuning with a frozen trunk, frozen old classifiers and pre-allocated ones
(arXiv 2508.04267).

Cross-entropy alone, without distillation and without pseudo-labels. The classifier has the channels of all
classes to come from the first step on, so that classes not yet seen are learned as negatives. After step 0
the trunk and the classifiers of earlier steps stay as they are; what is learned are the classifiers of this
step and of later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.method import Method

if TYPE_CHECKING:
    from torch import Tensor


class DFT(Method):
    """Cross-entropy over the channels of all classes to come; after step 0 only the newest classifiers
    learn."""

    title = "DFT*"
    paper = "arXiv 2508.04267, 2025"
    knows_later = True
    needs_teacher = False
    caveats = (
        "knows from the first step on how many classes each later step will add",
        "predicts among the seen classes only; the released code takes the channels of classes to come as "
        "well, and counts such a pixel in a cell of another class",
    )

    def heads(self, sizes: Sequence[int]) -> list[int]:
        """One a step of the whole protocol, whichever step is being learned."""
        own = [self.step.n_new] if len(sizes) == self.step.index else []
        return [*sizes, *own, *(len(group) for group in self.later)]

    def setup(self) -> None:
        if self.step.index:
            for part in (
                self.network.body,
                self.network.head,
                self.network.classifier.heads[: self.step.index],
            ):
                part.requires_grad_(False)

    def train_mode(self) -> None:
        super().train_mode()
        if self.step.index:  # the trunk's norms keep their statistics
            self.network.body.eval()
            self.network.head.eval()

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        classes: Tensor = output.logits[:, : self.step.n_classes].argmax(dim=1)
        return classes
