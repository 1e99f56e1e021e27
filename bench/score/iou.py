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
    """
    hit = np.diag(matrix).astype(np.float64)
    return hit / (matrix.sum(1) + matrix.sum(0) - hit + epsilon)


def mean_iou(
    matrix: np.ndarray, absent: str = "exclude", epsilon: float = EPSILON
) -> tuple[np.ndarray, float]:
    """(IoU of each class with NaN where it is left out, their mean) of counts [C, C]; NaN if none is left."""
    iou = class_iou(matrix, epsilon)
    if absent == "exclude":
        iou = np.where(matrix.sum(1) > 0, iou, np.nan)
    elif absent == "nonzero":
        iou = np.where(iou != 0, iou, np.nan)
    return iou, mean(iou)


def mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else float("nan")


def harmonic_mean(old: float, new: float) -> float:
    """Of the means over old and new classes; 0 if both are 0, NaN if one of them is."""
    return 2 * old * new / (old + new) if old + new else old + new


@dataclass(frozen=True)
class Accuracies:
    """Pixel accuracies.

    Attributes:
        overall: share of right pixels; NaN without a pixel.
        per_class: float64 [C].
        mean: of them.
        frequency_weighted_iou: IoU of the classes, weighted with how often they occur.
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

    Source: spec/protocol.md section 9.1; spec/mbs.md section 6.
    """
    how = CONVENTIONS.find("default") if how is None else how
    in_all = iou[iou != 0] if how.absent == "nonzero" else iou
    return {
        "old": mean(iou[0 if how.background_is_old else 1 : n_first]),
        "new": mean(iou[n_first:]),
        "all": mean(in_all),
    }
