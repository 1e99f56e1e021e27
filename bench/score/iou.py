"""From confusion counts to IoU under a convention. Pure functions of numpy arrays.

Source: spec/protocol.md section 9, spec/ssul.md section 10, spec/mbs.md section 6, spec/eir.md section 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.data.dataset import Dataset
from bench.protocol.protocol import Step
from bench.score.conventions import CONVENTIONS, EPSILON, Convention
from bench.score.counts import Counts


def class_iou(matrix: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """IoU of each class, float64 [C]; 0 (or minus 0) for a class without true and predicted pixels.

    Args:
        matrix: counts [C, C], rows true, columns predicted.
        epsilon: added to the denominator.

    Example:
        >>> class_iou(np.array([[6, 2], [0, 2]])).round(2).tolist()  # 6 of 8 pixels, 2 of 4
        [0.75, 0.5]
    """
    hit = np.diag(matrix).astype(np.float64)
    return hit / (matrix.sum(1) + matrix.sum(0) - hit + epsilon)


def mean_iou(
    matrix: np.ndarray, absent: str = "exclude", epsilon: float = EPSILON
) -> tuple[np.ndarray, float]:
    """(IoU of each class with NaN where it is left out, their mean) of counts [C, C]; NaN if none is left.

    Example:
        >>> counts = np.array([[6, 2, 0], [0, 2, 0], [0, 0, 0]])  # no pixel of class 2
        >>> round(mean_iou(counts)[1], 4), round(mean_iou(counts, absent="zero")[1], 4)
        (0.625, 0.4167)
    """
    iou = class_iou(matrix, epsilon)
    if absent == "exclude":
        iou = np.where(matrix.sum(1) > 0, iou, np.nan)
    elif absent == "nonzero":
        iou = np.where(iou != 0, iou, np.nan)
    return iou, mean(iou)


def mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if nothing is.

    Example:
        >>> mean(np.array([0.5, np.nan, 1.0]))
        0.75
    """
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else float("nan")


def harmonic_mean(old: float, new: float) -> float:
    """Of the means over old and new classes; 0 if both are 0, NaN if one of them is.

    Example:
        >>> harmonic_mean(0.75, 0.25), harmonic_mean(0.5, 0.5)
        (0.375, 0.5)
    """
    return 2 * old * new / (old + new) if old + new else old + new


@dataclass(frozen=True)
class Accuracies:
    """Pixel accuracies.

    Attributes:
        overall: share of right pixels; NaN without a pixel.
        per_class: float64 [C].
        mean: of them.
        frequency_weighted_iou: IoU of the classes, weighted with how often they occur.

    Example:
        >>> accuracies(np.array([[9, 0], [1, 0]])).overall  # every pixel is called background
        0.9
    """

    overall: float
    per_class: np.ndarray
    mean: float
    frequency_weighted_iou: float


def accuracies(matrix: np.ndarray, absent: str = "exclude") -> Accuracies:
    """Pixel accuracies of counts [C, C].

    Args:
        matrix: rows true, columns predicted.
        absent: a class without a true pixel is NaN and left out of the mean ("exclude"), or 0 ("zero").

    Example:
        >>> found = accuracies(np.array([[9, 0], [1, 0]]))  # the only pixel of class 1 is called background
        >>> found.overall, round(found.mean, 2)
        (0.9, 0.5)
    """
    rows = matrix.sum(1).astype(np.float64)
    hit = np.diag(matrix)
    per_class = hit / (rows + EPSILON)
    if absent == "exclude":
        per_class = np.where(rows > 0, per_class, np.nan)
    frequency = rows / (rows.sum() + EPSILON)
    present = frequency > 0
    weighted = frequency[present] @ class_iou(matrix)[present]
    overall = float(hit.sum() / rows.sum()) if rows.any() else float("nan")
    return Accuracies(overall, per_class, mean(per_class), float(weighted))


def score(
    counts: Counts, how: Convention, dataset: Dataset, step: Step, weights: np.ndarray | None = None
) -> np.ndarray:
    """IoU of each seen class in channel order, float64 [C]; NaN where the class is left out of every mean.

    A class that is only left out of "all" keeps its value: `old_new_all` decides.

    Example:
        >>> from bench.data.dataset import load_dataset
        >>> entries = np.array([[0, 0, 0], [0, 1, 1], [0, 2, 1]])  # image, true and predicted class
        >>> counts = Counts(("a",), np.array([True]), (0, 1, 2), 2, entries, np.array([6, 2, 2]))
        >>> voc, first = load_dataset("voc"), Step(0, (1,), ())
        >>> score(counts, CONVENTIONS.find("default"), voc, first).round(2).tolist()  # class 2: background
        [0.75, 0.5]
        >>> score(counts, CONVENTIONS.find("ssul"), voc, first).round(2).tolist()  # ignored
        [1.0, 1.0]
    """
    absent = "exclude" if how.absent == "exclude" else "zero"
    iou, _ = mean_iou(counts.matrix(how, dataset, step, weights), absent, how.epsilon)
    if not how.background:
        iou = iou.copy()
        iou[0] = np.nan
    return iou


def old_new_all(iou: np.ndarray, n_first: int, how: Convention | None = None) -> dict[str, float]:
    """Means of an IoU vector [C] over "old" (step 0's classes), "new" (those added since) and "all".

    Args:
        iou: NaN where a class is left out.
        n_first: channels of step 0, background included.
        how: says whether background is an old class, and whether zeros count in "all"; the default convention
            if None.

    Example:
        >>> old_new_all(np.array([0.9, 0.6, 0.3]), n_first=2)
        {'old': 0.75, 'new': 0.3, 'all': 0.6}
        >>> old_new_all(np.array([np.nan, 0.6, 0.3]), n_first=2, how=CONVENTIONS.find("mib"))["old"]
        0.6

    Source: spec/protocol.md section 9.1; spec/mbs.md section 6.
    """
    how = CONVENTIONS.find("default") if how is None else how
    in_all = iou[iou != 0] if how.absent == "nonzero" else iou
    return {
        "old": mean(iou[0 if how.background_is_old else 1 : n_first]),
        "new": mean(iou[n_first:]),
        "all": mean(in_all),
    }
