"""SSUL-M: SSUL with a memory of whole training images (Cha et al., NeurIPS 2021).

Before each later step a class-balanced memory is drawn from the last memory and from the previous step's
images, in which the previous network's confident predictions complete the labels. While the step trains, a
random half of every batch is replaced by images from memory, labelled with all classes learned so far.

Step 0 is SSUL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bench.lazy import torch
from bench.method import Later, replay
from methods.ssul import SSUL, sigmoid_pseudo_labels

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch, Batches

MEMORY_THRESHOLD = 0.7
"""Least score of a prediction that counts as a class of a candidate; fixed, whatever the pseudo-labels'
threshold in training."""


class SSULM(SSUL):
    """SSUL, its exemplar memory, and replay."""

    title = "SSUL-M"
    first_step = "ssul"
    caveats = (
        "images in memory carry the labels of all classes so far, more than was annotated when they were "
        "seen",
    )

    class Config(SSUL.Config):
        """Hyper-parameters of SSUL-M."""

        memory_size: Later[int] = Field(100, ge=0)
        """Images in memory; 0 is SSUL. Fewer are kept where there are not so many."""
        memory_labels: Later[Literal["as_published", "shifted"]] = "as_published"
        """Labels of images from memory: in the data set's channels, as the released code has them (class k
        trains the channel of class k - 1, background the unknown channel), or shifted like all others."""

    def start_step(self) -> None:
        super().start_step()
        if self.step.index and self.config.memory_size:
            drawn = replay.draw_memory(
                self.data, self.previous, self.classes_of_candidates, self.config.memory_size, "center-crop"
            )
            self.state[replay.STATE] = drawn

    def classes_of_candidates(self, batch: Batch) -> Sequence[Sequence[int]]:
        """What images of the previous step show: their labels, from the third step on completed by the
        previous network."""
        return classes_shown(
            self.encode(batch),
            batch.teacher.logits if self.step.index > 1 else None,
            self.last_not_foreground,
        )

    def setup(self) -> None:
        super().setup()
        names = self.memory()
        self.exemplars = None
        if names:
            filled = replay.at_least_a_batch(names, self.config.batch_size)
            self.exemplars = self.data.images(self.step.index, filled, table=self.data.all_seen_table())

    def batches(self, epoch: int) -> Batches:
        return (
            super().batches(epoch)
            if self.exemplars is None
            else replay.HalfReplay(self.data, self.exemplars, epoch)
        )

    def encode(self, batch: Batch) -> Tensor:
        labels = super().encode(batch)
        if self.config.memory_labels == "as_published" and "replayed" in batch.extra:
            labels = torch.where(batch.extra["replayed"][:, None, None], batch.labels, labels)
        return labels

    @classmethod
    def footnotes(cls, config: Any) -> list[str]:
        notes = super().footnotes(config)
        if not config.memory_size:
            return [note for note in notes if note not in cls.caveats]
        notes.insert(0, f"memory of {config.memory_size} images")
        if config.memory_labels == "as_published" and config.unknown:
            notes.append(
                "labels of images in memory are not shifted by the unknown channel, as in the released code"
            )
        return notes


def classes_shown(
    labels: Tensor, logits_old: Tensor | None, last_not_foreground: int, threshold: float = MEMORY_THRESHOLD
) -> list[list[int]]:
    """The classes that count for each candidate of the memory.

    Args:
        labels: int64 [B, H, W] in the channels of the heads.
        logits_old: of the previous network, [B, C_old, H, W], or None where the labels are complete.
        last_not_foreground, threshold: as in `sigmoid_pseudo_labels`.

    Source: spec/ssul.md section 9, step 2.
    """
    if logits_old is not None:
        labels = sigmoid_pseudo_labels(logits_old, labels, last_not_foreground, threshold)
    return replay.shown_classes(labels, last_not_foreground)
