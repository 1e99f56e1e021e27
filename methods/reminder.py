"""REMINDER: class-similarity weighted knowledge distillation (Phan et al., CVPR 2022).

PLOP, and one term more: on pixels of new classes the old network's scores are distilled at a temperature,
each old class as much as it resembles the new class of the pixel. Classes are compared by their prototypes,
means of the head's features; those of earlier classes are kept.

The prototypes of a step are made when the next one begins, by its old network: the first step is that of
every method that starts with cross-entropy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bench.errors import TrainingError
from bench.lazy import F, at_least_float32, torch
from bench.method import Later
from methods.plop import PLOP

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch

LEAST_TARGET = 1e-7


def batch_prototypes(features: Tensor, labels: Tensor, first: int, n_classes: int) -> Tensor:
    """Mean feature of each class over the pixels of a batch, without gradient.

    Args:
        features: [B, D, h, w], resized to the labels with corners aligned.
        labels: int64 [B, H, W].
        first: the first class that has one.
        n_classes: C.

    Returns:
        [C, D]; zero rows for classes before `first` and for those that no pixel shows.

    Source: spec/reminder.md section 1.
    """
    wanted = range(first, n_classes)
    sums = features.new_zeros(n_classes, features.shape[1])
    pixels = features.new_zeros(n_classes)
    with torch.no_grad():
        for image, label in zip(features, labels, strict=True):  # one by one: a resized map is large
            resized = F.interpolate(image[None], size=label.shape, mode="bilinear", align_corners=True)[0]
            masks = torch.stack([label == c for c in wanted]).to(resized.dtype).flatten(1)
            sums[first:] += masks @ resized.flatten(1).T
            pixels[first:] += masks.sum(1)
    return sums / pixels.clamp(min=1)[:, None]


class PrototypeMean:
    """Mean of the batches' prototypes; a batch counts once for each class it shows, however many pixels.

    Args:
        first: the first class that has one.
        n_classes: C.

    Source: spec/reminder.md section 1.
    """

    def __init__(self, first: int, n_classes: int) -> None:
        self.first, self.n_classes = first, n_classes
        self.total: Tensor | None = None
        self.batches = torch.zeros(n_classes)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Count one batch: features [B, D, h, w], labels int64 [B, H, W]."""
        found = batch_prototypes(features, labels, self.first, self.n_classes)
        shown = torch.stack([(labels == c).any() for c in range(self.n_classes)])
        shown[: self.first] = False
        self.total = found if self.total is None else self.total + found
        self.batches = self.batches.to(found) + shown.to(found)

    def mean(self) -> Tensor:
        """[C, D] over what every process counted; zero rows for classes that no batch shows.

        Raises:
            TrainingError: no batch was counted.
        """
        from bench.distributed import summed

        if self.total is None:
            raise TrainingError("prototypes: the images of the previous step do not fill one batch")
        return summed(self.total) / summed(self.batches).clamp(min=1)[:, None]


def class_similarity_distillation(
    logits: Tensor,
    logits_old: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    prototypes_old: Tensor,
    temperature: float = 3.0,
    delta: float = 0.0,
) -> Tensor:
    """Distillation on pixels of new classes, each old class weighted by its similarity to the pixel's class.

    Args:
        logits: [B, C, H, W] at label size.
        logits_old: [B, C_old, H, W].
        labels: int64 [B, H, W].
        prototypes: [C, D] of the batch.
        prototypes_old: [C_old, D].
        temperature: T.
        delta: similarities below delta / C_old count as 0; the others are not made to sum to 1 again.

    Returns:
        A scalar; 0 if no pixel shows a new class, where the released code has 0/0.

    Source: spec/reminder.md section 2.
    """
    n_old = logits_old.shape[1]
    new = (labels >= n_old) & (labels < logits.shape[1])
    if not new.any():
        return logits.new_zeros(())
    cosine = F.normalize(prototypes, dim=1) @ F.normalize(prototypes_old, dim=1).T  # [C, C_old]
    similarity = cosine.softmax(dim=1)
    similarity = torch.where(similarity < delta / n_old, 0.0, similarity)
    z_old, z = (x.permute(0, 2, 3, 1)[new] / temperature for x in (logits_old, logits[:, :n_old]))
    target = z_old.softmax(dim=1) * similarity[labels[new]] + LEAST_TARGET
    loss: Tensor = -(target.detach() * z.log_softmax(dim=1)).sum(dim=1).mean()
    return temperature**2 * loss


class REMINDER(PLOP):
    """PLOP, and distillation on new classes' pixels, weighted by the similarity of classes."""

    title = "REMINDER"
    paper = "Phan, Ta, Phung, Phan-Vu, Bouzerdoum, CVPR 2022"
    caveats = (
        "an image without a pixel of background or of earlier classes has an adaptive factor of 0, where the "
        "released code has 0/0; likewise a batch without a pixel of a new class has no distillation there",
    )

    class Config(PLOP.Config):
        """Hyper-parameters of REMINDER."""

        first_batch_size: int | None = Field(None, ge=2)
        """Images of one update at step 0."""
        similarity: Later[float] = Field(0.5, ge=0)
        """Weight of the class-similarity weighted distillation."""
        temperature: Later[float] = Field(3.0, gt=0)
        """Of that distillation."""
        delta: Later[float] = Field(0.0, ge=0)
        """Similarities below delta over the number of old classes count as 0."""

    def start_step(self) -> None:
        super().start_step()
        if self.step.index:
            self.state["prototypes"] = self.prototypes()

    def prototypes(self) -> Tensor:
        """Those of all earlier classes, [C_old, D]: the previous step's from a pass of the old network over
        its images, earlier ones as they were kept."""
        before = self.data.protocol.step(self.step.index - 1)
        first = before.n_old if before.index else 0
        mean = PrototypeMean(first, before.n_classes)
        for batch in self.data.stream(images=self.data.images(before.index)):
            mean.update(at_least_float32(batch.teacher.features), batch.labels)
        found = mean.mean()
        if before.index:
            found[:first] = self.previous["prototypes"].to(found)
        return found

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().losses(batch)
        if not self.step.index:
            return terms
        new, labels, c = batch.output, batch.labels, self.config
        with torch.autocast(labels.device.type, enabled=False):
            features = at_least_float32(new.features).detach()
            terms["csw"] = c.similarity * class_similarity_distillation(
                at_least_float32(new.logits),
                at_least_float32(batch.teacher.logits),
                labels,
                batch_prototypes(features, labels, self.step.n_old, self.step.n_classes),
                self.state["prototypes"].to(features),
                c.temperature,
                c.delta,
            )
        return terms
