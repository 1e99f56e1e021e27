"""PLOP: Learning without Forgetting for Continual Semantic Segmentation (Douillard et al., CVPR 2021).

Background pixels get the old network's prediction as a pseudo-label where that network is certain enough,
certainty being the entropy against a threshold of each class; images with few certain pixels count less.
Features are held by Local POD, a distance of multi-scale strip-pooled maps. The new classifier starts from
the background's, as in MiB.

The thresholds are computed as the released code does, oddities included (spec/plop.md sections 4 and 8).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from bench.lazy import at_least_float32, torch
from bench.method import IGNORE, Later, Method, Neutral, cross_entropy_map
from methods.mib import background_classifier_init

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch

BINS = 100
EPSILON = 1e-8


def pixel_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of each pixel: the MEAN over channels of -p log p, divided by log of their number.

    Args:
        probabilities: [B, C, H, W].

    Returns:
        [B, H, W], from 0 to 1 / C.
    """
    n = probabilities.shape[1]
    return -(probabilities * torch.log(probabilities + EPSILON)).mean(dim=1) / math.log(n + EPSILON)


class EntropyThresholds:
    """The acceptance threshold of each class, from histograms of the old network's entropy on background
    pixels.

    Args:
        n_old_classes: C_old, background included.
        n_classes: C.
        base: the least threshold.
        mode: "entropy" as published, or "probability": of the highest probability, in 20 bins (PLOP's variant
            "median").
        limit: most that a bin counts; None for no limit.

    Source: spec/plop.md section 4. The median's running sum adds bin indices, not counts, and is kept so.
    """

    def __init__(
        self,
        n_old_classes: int,
        n_classes: int,
        base: float = 0.001,
        mode: Literal["entropy", "probability"] = "entropy",
        limit: int | None = None,
    ) -> None:
        self.n_old_classes, self.n_classes, self.base, self.mode = n_old_classes, n_classes, base, mode
        self.limit = limit
        self.max_value = math.log(n_classes) if mode == "entropy" else 1.0
        self.bins = BINS if mode == "entropy" else 20
        self.histogram = torch.zeros(n_classes, self.bins, dtype=torch.long)

    def update(self, logits_old: Tensor, labels: Tensor) -> None:
        """Count one batch: logits [B, C_old, H, W] at label size, labels int64 [B, H, W]; only pixels
        labelled 0 count."""
        probabilities = torch.softmax(at_least_float32(logits_old), dim=1)
        highest, predicted = probabilities.max(dim=1)
        value = pixel_entropy(probabilities) / self.max_value if self.mode == "entropy" else highest
        k = (value * self.bins).long().clamp(0, self.bins - 1)
        cell = (predicted * self.bins + k)[labels == 0]
        self.histogram = self.histogram.to(cell.device)
        self.histogram += torch.bincount(cell, minlength=self.histogram.numel()).view_as(self.histogram)

    def thresholds(self) -> Tensor:
        """float32 [C]; inf accepts every pixel predicted as the class, NaN none."""
        histogram = self.histogram.cpu().clamp(max=self.limit) if self.limit else self.histogram.cpu()
        out = torch.zeros(self.n_classes)
        for c in range(self.n_classes):
            total = histogram[c].sum()
            if total:
                out[c] = self._median(histogram[c], total)
        if self.mode == "probability":
            return torch.minimum(out, torch.tensor(self.base))
        return torch.where(
            torch.isnan(out), out, out.clamp(min=self.base)
        )  # max() of Python keeps a NaN that comes first

    def _median(self, counts: Tensor, total: Tensor) -> Tensor:
        half = total / 2
        running = 0.0
        for i in range(self.bins):
            edge = i / self.bins
            k = int(edge * self.bins)  # i, except where the product falls just below it
            if running <= half <= running + counts[k]:
                break
            running += edge * self.bins
        return edge + (half - running) / counts[k] * (1 / self.bins)


def pseudo_label(
    logits_old: Tensor, labels: Tensor, thresholds: Tensor, n_old_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Background pixels take the old network's class where its entropy is below that class's threshold, else
    they are ignored.

    Args:
        logits_old: [B, C_old, H, W] at label size.
        labels: int64 [B, H, W].
        thresholds: [C].
        n_old_classes: C_old.

    Returns:
        (targets int64 [B, H, W], accepted bool [B, H, W] before it is confined to background, adaptive factor
        [B]: the share of background pixels that were accepted).

    Source: spec/plop.md section 5 a, b.
    """
    probabilities = torch.softmax(at_least_float32(logits_old), dim=1)
    predicted = probabilities.argmax(dim=1)
    accepted = pixel_entropy(probabilities) / math.log(thresholds.numel()) < thresholds[predicted]
    background = labels < n_old_classes
    targets = torch.where(background & accepted, predicted, labels)
    targets = torch.where(background & ~accepted, IGNORE, targets)
    factor = (background & accepted).flatten(1).sum(1).float() / (background.flatten(1).sum(1).float() + 1e-6)
    return targets, accepted, factor


def classification_loss(logits: Tensor, targets: Tensor, factor: Tensor) -> Tensor:
    """Cross-entropy weighted image by image, averaged over all pixels.

    Args:
        logits: [B, C, H, W].
        targets: int64 [B, H, W].
        factor: [B].

    Source: spec/plop.md section 5 c.
    """
    return (cross_entropy_map(logits, targets) * factor[:, None, None]).mean()


def local_pod_embedding(features: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Strip-pooled features at several scales, [B, D].

    At scale s the map is cut into s x s windows of side W // s (the width, on both axes); each gives its mean
    over columns (channel-major, rows) and its mean over rows (channel-major, columns).

    Args:
        features: [B, c, H, W]; on a map that is not square, what lies beyond the windows is left out.

    Raises:
        ValueError: a window without a pixel: the map is narrower than a scale, or much wider than high.

    Source: paper Eq. 3; spec/plop.md section 5 d.
    """
    height, width = features.shape[-2:]
    strips = []
    for s in scales:
        k = width // s
        if not k or (s - 1) * k >= height:
            raise ValueError(
                f"Local POD at scale {s} has windows without a pixel on a map of {height} x {width}"
            )
        for i in range(s):
            for j in range(s):
                window = features[:, :, i * k : (i + 1) * k, j * k : (j + 1) * k]
                strips += [window.mean(dim=3).flatten(1), window.mean(dim=2).flatten(1)]
    return torch.cat(strips, dim=1)


def local_pod_distance(old: Tensor, new: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Euclidean distance of the Local POD embeddings of two squared maps, [B].

    Means are linear, so the difference of the squares is pooled once. On a square map whose side the scales
    divide, the strips of a coarse scale are means of those of a fine one.

    Args:
        old, new: [B, c, H, W]; the gradient is that of `new`.
        scales: windows a side.

    Source: spec/plop.md section 5 d.
    """
    finest, (height, width) = max(scales), new.shape[-2:]
    if height != width or width % finest or any(finest % s for s in scales):
        difference = local_pod_embedding(new.square(), scales) - local_pod_embedding(old.square(), scales)
        return torch.linalg.vector_norm(difference, dim=1)
    rows, columns = _strips()(new, old, finest)
    norms = []
    for s in scales:
        of_rows = rows.unflatten(3, (s, finest // s)).mean(4)
        of_columns = columns.unflatten(2, (s, finest // s)).mean(3)
        norms += [torch.linalg.vector_norm(part, dim=(1, 2, 3)) for part in (of_rows, of_columns)]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


@functools.cache
def _strips() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """(new, old, s) -> new² - old² in windows of side k = W / s: means of their rows [B, c, H, s], and of
    their columns [B, c, s, W].

    The backward pass writes one map, where that of the operators one by one writes five.
    """

    class Strips(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, new: Tensor, old: Tensor, s: int) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(new)
            difference = new.square().sub_(old.square())
            return difference.unflatten(3, (s, -1)).mean(4), difference.unflatten(2, (s, -1)).mean(3)

        @staticmethod
        def backward(ctx: Any, *of_strips: Tensor) -> tuple[Tensor, None, None]:
            (new,) = ctx.saved_tensors
            s = of_strips[0].shape[3]
            slope = 2 * s / new.shape[3]  # of a mean of k squares
            rows = (of_strips[0] * slope).unflatten(2, (s, -1)).unsqueeze(5)  # [B, c, s, k, s, 1]
            columns = (of_strips[1] * slope).unflatten(3, (s, -1)).unsqueeze(3)  # [B, c, s, 1, s, k]
            out = torch.empty_like(new)
            torch.add(rows, columns, out=out.unflatten(3, (s, -1)).unflatten(2, (s, -1)))
            return out.mul_(new), None, None

    return Strips.apply


def fold_new_logits(logits: Tensor, n_old_classes: int, how: str = "sum") -> Tensor:
    """Logits [B, C, …] as the old network could have made them: new channels added to background ("sum") or
    left out ("trim")."""
    old = logits[:, :n_old_classes]
    if how == "trim":
        return old
    background = old[:, :1] + logits[:, n_old_classes:].sum(dim=1, keepdim=True)
    return torch.cat([background, old[:, 1:]], dim=1)


def local_pod_distillation(
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    factors: Sequence[float],
    class_factor: float = 1.0,
    scales: Sequence[int] = (1, 2, 4),
) -> Tensor:
    """Mean over maps of factor times the batch-mean Euclidean distance of Local POD embeddings of squared
    maps.

    Args:
        old, new: maps [B, c, H, W], one pair a layer.
        factors: weight of each layer.
        class_factor: sqrt(C / C_new), PLOP's schedule.

    Source: spec/plop.md section 5 d (squared activations, unsquared norm).
    """
    terms = []
    for a, b, factor in zip(old, new, factors, strict=True):
        distance = local_pod_distance(at_least_float32(a), at_least_float32(b), scales)
        terms.append(factor * class_factor * distance.mean())
    return torch.stack(terms).mean()


class PLOP(Method):
    """Entropy pseudo-labels with adaptive factor, Local POD on body, head and logits, background-based
    initialisation."""

    title = "PLOP"
    paper = "Douillard, Chen, Dapogny and Cord, CVPR 2021"
    first_step = "ft"

    class Config(Method.Config):
        """Hyper-parameters of PLOP."""

        pod: Later[float] = Field(0.01, ge=0)
        """Weight of Local POD on the body's maps and the head's output."""
        pod_logits: Later[float] = Field(0.0005, ge=0)
        """Weight of Local POD on the logits."""
        scales: Later[tuple[int, ...]] = (1, 2, 4)
        """Windows a side of Local POD."""
        base_threshold: Later[float] = Field(0.001, ge=0)
        """Least entropy threshold."""
        histogram_limit: Later[Annotated[int | None, Neutral(None)]] = Field(None, ge=1)
        """Most pixels that a bin of the entropies' histogram counts: 2^24 where a code counts in single
        precision (EWF's, not PLOP's); None for no limit."""

    def init_classifier(self) -> None:
        background_classifier_init(self.network.classifier)

    def start_step(self) -> None:
        if self.step.index:
            self.state["thresholds"] = self.find_thresholds()

    def find_thresholds(self) -> Tensor:
        """One pass of the old network over the step's augmented images, as epoch 0 will draw them."""
        from bench.distributed import summed

        assert self.teacher is not None
        c = self.config
        found = EntropyThresholds(
            self.step.n_old, self.step.n_classes, c.base_threshold, limit=c.histogram_limit
        )
        for batch in self.data.stream(epoch=0):
            found.update(batch.teacher.logits, batch.labels)
        found.histogram = summed(found.histogram.to(next(self.teacher.parameters()).device))
        return found.thresholds()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.step.index:
            return super().losses(batch)
        new, old = batch.output, batch.teacher
        thresholds = self.state["thresholds"].to(batch.labels.device)
        targets, _, factor = pseudo_label(old.logits, batch.labels, thresholds, self.step.n_old)
        with torch.autocast(
            new.logits.device.type, enabled=False
        ):  # squared activations leave the range of half precision
            pod = local_pod_distillation(
                [*old.maps, old.features, old.small_logits],
                [
                    *new.maps,
                    new.features,
                    fold_new_logits(at_least_float32(new.small_logits), self.step.n_old),
                ],
                [self.config.pod] * (len(new.maps) + 1) + [self.config.pod_logits],
                math.sqrt(self.step.n_classes / self.step.n_new),
                self.config.scales,
            )
        return {"ce": classification_loss(new.logits, targets, factor), "pod": pod}
