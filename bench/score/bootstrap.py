"""How far mIoU depends on which test images there are: bootstrap intervals from the counts of each image.

Images are drawn with replacement and the metric is computed again, as `Counts.matrix(weights=…)` would, for
all draws at once: IoU needs only three counts of each image and class, so a thousand draws are three matrix
products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from bench.data.dataset import Dataset
from bench.protocol.labels import labels_by_class, rule
from bench.protocol.protocol import Step
from bench.score.conventions import Convention
from bench.score.counts import Counts

DRAWS = 1000
COVERAGE = 95
"""Percent of the draws inside the interval."""


def interval(
    counts: Sequence[Counts], how: Convention, dataset: Dataset, steps: Sequence[Step]
) -> tuple[float, float] | None:
    """The interval of mIoU "all" in percent, of the mean over some results (seeds) on the same test images.

    Args:
        counts: of each result.
        how, dataset: decide which pixels count as which class.
        steps: of each result.

    Returns:
        (low, high), or None if there is no result, or the results were not tested on the same images.

    Example:
        >>> from bench.data.dataset import load_dataset
        >>> from bench.score.conventions import convention
        >>> entries = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 0], [1, 1, 0]])  # b misses class 1
        >>> counts = Counts(("a", "b"), np.array([True, True]), (0, 1), 2, entries, np.array([6, 2, 6, 2]))
        >>> low, high = interval([counts], convention("default"), load_dataset("voc"), [Step(0, (1,), ())])
        >>> round(low, 1), round(high, 1)  # from b twice to a twice
        (37.5, 100.0)
    """
    if not counts or any(other.images != counts[0].images for other in counts):
        return None
    weights = _drawn(len(counts[0].images))
    means = np.mean(
        [draws(c, how, dataset, step, weights) for c, step in zip(counts, steps, strict=True)], axis=0
    )
    return percentile_interval(100 * means)


@functools.lru_cache(maxsize=4)
def _drawn(n: int) -> np.ndarray:
    """How often each of n images is drawn, float64 [DRAWS, n]: the same for every row, so that rows are
    compared on the same draws."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)


def percentile_interval(values: np.ndarray, coverage: float = COVERAGE) -> tuple[float, float]:
    """(low, high) between which `coverage` percent of the values lie.

    Example:
        >>> percentile_interval(np.arange(101.0))
        (2.5, 97.5)
    """
    low, high = np.percentile(values, [50 - coverage / 2, 50 + coverage / 2])
    return float(low), float(high)


def draws(counts: Counts, how: Convention, dataset: Dataset, step: Step, weights: np.ndarray) -> np.ndarray:
    """mIoU "all" with each image counted `weights` times, float64 [B]; NaN where no class is left.

    Args:
        counts: of each test image.
        how, dataset, step: decide which pixels count as which class.
        weights: int or float64 [B, N].

    Example:
        >>> from bench.data.dataset import load_dataset
        >>> from bench.score.conventions import convention
        >>> entries = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 0], [1, 1, 0]])  # b misses class 1
        >>> counts = Counts(("a", "b"), np.array([True, True]), (0, 1), 2, entries, np.array([6, 2, 6, 2]))
        >>> weights = np.array([[2, 0], [1, 1], [0, 2]])
        >>> mious = draws(counts, convention("default"), load_dataset("voc"), Step(0, (1,), ()), weights)
        >>> mious.round(2).tolist()
        [1.0, 0.68, 0.37]
    """
    hit, true, predicted = _per_image(counts, how, dataset, step)
    hits, trues, predictions = (weights @ part for part in (hit, true, predicted))
    iou = hits / (trues + predictions - hits + how.epsilon)
    if how.absent == "exclude":
        iou[trues == 0] = np.nan
    elif how.absent == "nonzero":
        iou[iou == 0] = np.nan
    if not how.background:
        iou[:, 0] = np.nan
    kept = ~np.isnan(iou)
    with np.errstate(invalid="ignore"):
        return np.where(kept, iou, 0).sum(1) / kept.sum(1)


def _per_image(
    counts: Counts, how: Convention, dataset: Dataset, step: Step
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, true and predicted pixels of each image and class, float64 [N, C] each."""
    labels = rule(how.labels)
    order = (*step.seen, *(c for c in range(1, len(dataset.classes)) if c not in step.seen))
    label_of_class = labels_by_class(labels.view("test", dataset), len(dataset.classes), order, step)
    image, row, column = counts.entries.T
    label = np.array([label_of_class[c] for c in counts.rows])[row]
    scored = (label < counts.n_classes) & (labels.tests_all | counts.shows_seen[image])
    image, label, column, values = image[scored], label[scored], column[scored], counts.values[scored]
    right = label == column

    def summed(image: np.ndarray, classes: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        shape = len(counts.images), counts.n_classes
        return np.bincount(image * counts.n_classes + classes, pixels, shape[0] * shape[1]).reshape(shape)

    hit = summed(image[right], label[right], values[right])
    return hit, summed(image, label, values), summed(image, column, values)
