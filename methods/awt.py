"""AWT: Attribution-aware Weight Transfer (Goswami, Schuster, van de Weijer and Stricker, WACV 2023).

AWT wraps another method (the released code: MiB) and replaces the initialisation of its new classifier. A new
row keeps its random values and receives the background's row on a quarter of the channels: those that matter
most to the old network's background score where the new classes are. How much a channel matters is its
attribution by integrated gradients. The score is linear in the features that the classifier reads, so the
attribution has a closed form, and one pass over the step's images finds it, without a gradient.

The released code is followed, oddities included (spec/awt.md section 5): of the mean map the signed maximum
counts, so one strong position decides; biases stay random, and the background's is not lowered although MiB's
losses are used. Where each class has channels of its own, the maps of the classes before it count too
("accumulated"); "per-class" is the corrected form. Here one pass serves all classes, which the code meets in
one pass each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from bench.lazy import F, at_least_float32, torch
from bench.method import Later, Method

if TYPE_CHECKING:
    from torch import Tensor

    from bench.models.classifier import Classifier


class Attribution:
    """What each channel adds to the old network's background score where some classes are.

    Args:
        background_weight: the background's row, [D].
        groups: labels whose pixels count together; each group is attributed on its own.
        limit: a group is done with the first image that shows it at this position or later; None: never.

    Source: spec/awt.md section 2, the closed form of layer integrated gradients.
    """

    def __init__(
        self, background_weight: Tensor, groups: Sequence[Sequence[int]], limit: int | None = None
    ) -> None:
        self.background_weight, self.groups, self.limit = background_weight, groups, limit
        self.sums: Tensor | None = None
        self.images = background_weight.new_zeros(len(groups), dtype=torch.float64)
        self.done = [False] * len(groups)

    def update(self, features: Tensor, baseline: Tensor, labels: Tensor, positions: Sequence[int]) -> None:
        """Count some images.

        Args:
            features: of the old network, [B, D, h, w].
            baseline: of an image of zeros (the mean colour), [1, D, h, w].
            labels: int64 [B, H, W].
            positions: of each image in the pass.
        """
        size = features.shape[-2:]
        scale = labels.shape[-2] * labels.shape[-1] / (size[0] * size[1])
        moved = scale * (features - baseline).double()
        small = F.interpolate(labels[:, None].double(), size=size, mode="nearest")[:, 0]
        if self.sums is None:
            self.sums = moved.new_zeros(len(self.groups), *moved.shape[1:])
        for k, group in enumerate(self.groups):
            there = torch.isin(small, small.new_tensor(group))
            for i in there.any(dim=(1, 2)).nonzero().flatten().tolist():
                if self.done[k]:
                    break
                self.sums[k] += moved[i] * there[i]
                self.images[k] += 1
                self.done[k] = self.limit is not None and positions[i] >= self.limit

    def scores(self, accumulated: bool = False) -> Tensor:
        """The maximum of each channel's mean map, [groups, D]; NaN for a group without an image.

        Args:
            accumulated: a group's mean is over the maps of all groups up to it.
        """
        assert self.sums is not None
        sums, images = (
            (self.sums.cumsum(0), self.images.cumsum(0)) if accumulated else (self.sums, self.images)
        )
        mean = self.background_weight.double()[:, None, None] * sums / images[:, None, None, None]
        return mean.flatten(2).amax(dim=2)


def best_channels(scores: Tensor, percent: float) -> Tensor:
    """The highest-scoring channels, bool of the shape of `scores` [..., D]; none where scores are NaN.

    Source: spec/awt.md section 2.
    """
    best = scores.topk(round(scores.shape[-1] * percent / 100), dim=-1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return chosen & ~scores.isnan()


def transfer_background(classifier: Classifier, channels: Tensor) -> None:
    """Add the background's row to the new rows on some channels; no bias changes.

    Args:
        classifier: a linear classifier whose last head is the new one; changed in place.
        channels: [D], or [N, D] for each new class.

    Source: spec/awt.md section 3.
    """
    first, new = classifier.heads[0], classifier.heads[-1]
    with torch.no_grad():
        mask = channels.to(new.weight)[..., None, None]
        new.weight += first.weight[:1] * mask


class AWT(Method):
    """Any method on a linear classifier, its random new rows warmed by the background's most attributed
    channels."""

    title = "AWT"
    paper = "Goswami, Schuster, van de Weijer and Stricker, WACV 2023"
    wraps = ("linear",)
    needs_teacher = True

    class Config(Method.Config):
        """Hyper-parameters of AWT."""

        percent: Later[float] = Field(25.0, gt=0, le=100)
        """Share of the channels that the new rows receive, in percent."""
        attribution: Later[Literal["union", "accumulated", "per-class"]] = "union"
        """Whose pixels choose the channels: those of all new classes together; of each class and of those
        before it in the step, as the code has it; or of each class alone, the corrected form."""
        attribution_images: Later[int | None] = Field(None, ge=0)
        """The attribution ends with the first image of the class at this position of the pass or later;
        None: all images."""

    def init_classifier(self) -> None:
        """In place of the wrapped method's: the new head is as it was drawn, and the transfer is added."""
        transfer_background(self.network.classifier, self.channels())

    def channels(self) -> Tensor:
        """The channels of the new rows, [1, D] or [N, D], from one pass of the old network over the step's
        augmented images. A class that no image shows keeps its random row."""
        from bench.distributed import summed

        new = range(self.step.n_old, self.step.n_classes)
        together = self.config.attribution == "union"
        groups = [list(new)] if together else [[label] for label in new]
        row = self.teacher.classifier.heads[0].weight[0].detach().flatten()
        found, baseline, met = Attribution(row, groups, self.config.attribution_images), None, self.data.rank
        for drawn in self.data.stream(whole=True):
            batch = drawn.in_full_precision()
            if baseline is None:
                baseline = at_least_float32(
                    batch.replaced(torch.zeros_like(batch.images[:1])).teacher.features
                )
            positions = range(met, met + self.data.world * len(batch.images), self.data.world)
            found.update(at_least_float32(batch.teacher.features), baseline, batch.labels, positions)
            met = positions.stop
            if all(found.done):
                break
        assert found.sums is not None
        found.sums, found.images = summed(found.sums), summed(found.images)
        scores = found.scores(self.config.attribution == "accumulated")
        unseen = [group for group, images in zip(groups, found.images.tolist(), strict=True) if not images]
        if unseen:
            print(f"WARNING: AWT: no image shows {unseen}: plain random rows for what has no map", flush=True)
        return best_channels(scores, self.config.percent)
