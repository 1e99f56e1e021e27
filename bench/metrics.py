"""From confusion counts to IoU under a named convention. Pure functions of numpy arrays.

"mIoU all" is more than one quantity: the authors average with or without background, ignore future classes or count them as
background, leave out images without a seen class or keep them, and disagree on classes that do not occur. One pass over the test
images keeps the counts of each image, rows = all classes of the data set, columns = predicted classes; each convention is a
function of those counts.

Source: spec/protocol.md section 9, spec/ssul.md section 10, spec/mbs.md section 6, spec/eir.md section 6.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.data.dataset import Dataset
from bench.data.labels import labels_by_class, rule
from bench.errors import UserError, unknown
from bench.protocol import Step

EPSILON = 1e-6


@dataclass(frozen=True)
class Convention:
    """How counts become a number.

    Attributes:
        labels: the label rule whose test view applies (what future classes and background are, which images are tested).
        background: background is one of the averaged classes.
        background_is_old: it is also one of the old classes.
        absent: a class without a test pixel is left out of the mean ("exclude"), or counts as 0 ("zero"); "nonzero" leaves out every
            class whose IoU is exactly 0.
        epsilon: added to the denominator; EIR subtracts it.
        says: one line for people.
    """

    labels: str
    background: bool
    absent: str
    says: str
    epsilon: float = EPSILON
    background_is_old: bool = True


CONVENTIONS: dict[str, Convention] = {
    "default": Convention(
        "plop", True, "exclude",
        "background in the mean, pixels of future classes are background, images without a seen class left out, absent classes left out",
    ),
    "mib": Convention(
        "mib", False, "exclude",
        "background not in the mean, pixels of future classes ignored, images without a seen class left out, absent classes left out",
    ),
    "ssul": Convention("ssul", True, "zero", "background in the mean, pixels of future classes ignored, all images, absent classes count as 0"),
    "mbs": Convention(
        "mbs", True, "nonzero",
        "background in the mean but not in old, pixels of future classes ignored, all images, classes at exactly 0 left out",
        background_is_old=False,
    ),
    "eir": Convention(
        "eir", True, "zero",
        "background in the mean, pixels of future classes are background, images without a seen class left out, absent classes count as 0",
        -EPSILON,
    ),
}  # fmt: skip


def convention(name: str) -> Convention:
    """The convention of that name."""
    if name not in CONVENTIONS:
        raise unknown("convention", name, CONVENTIONS, where="--convention")
    return CONVENTIONS[name]


def class_iou(matrix: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """IoU of each class, float64 [C]; 0 (or minus 0) for a class without true and predicted pixels.

    Args:
        matrix: counts [C, C], rows true, columns predicted.
        epsilon: added to the denominator.
    """
    hit = np.diag(matrix).astype(np.float64)
    return hit / (matrix.sum(1) + matrix.sum(0) - hit + epsilon)


def mean_iou(matrix: np.ndarray, absent: str = "exclude", epsilon: float = EPSILON) -> tuple[np.ndarray, float]:
    """(IoU of each class with NaN where it is left out, their mean) of counts [C, C]; NaN if nothing is left."""
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


def accuracies(matrix: np.ndarray, absent: str = "exclude") -> dict[str, Any]:
    """Pixel accuracies of counts [C, C]: overall (NaN without a pixel), per class [C], their mean, and the frequency-weighted IoU.

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
    return {"overall": overall, "per_class": per_class, "mean": mean(per_class), "frequency_weighted_iou": float(weighted)}


@dataclass(frozen=True)
class Counts:
    """Confusion counts of each test image after one step.

    Attributes:
        images: names of the test images, in list order.
        shows_seen: bool [N]: the image shows a class learned so far, in its whole mask (not only in the crop).
        rows: class ids of the rows: seen classes in channel order, then all others ascending.
        n_classes: number of columns, the channels of the network in label space.
        entries: int32 [n, 3], (image, row, column) of every count that is not 0.
        values: int64 [n], the counts.
    """

    images: tuple[str, ...]
    shows_seen: np.ndarray
    rows: tuple[int, ...]
    n_classes: int
    entries: np.ndarray
    values: np.ndarray

    def total(self, chosen: np.ndarray | None = None, weights: np.ndarray | None = None) -> np.ndarray:
        """Summed counts, int64 [rows, columns]; of some images (bool [N]), or each image counted `weights` [N] times."""
        image, row, column = self.entries.T
        values = self.values if weights is None else self.values * weights[image]
        keep = slice(None) if chosen is None else chosen[image]
        out = np.zeros((len(self.rows), self.n_classes), np.int64)
        np.add.at(out, (row[keep], column[keep]), values[keep])
        return out

    def matrix(self, how: Convention, dataset: Dataset, step: Step, weights: np.ndarray | None = None) -> np.ndarray:
        """The square matrix [C, C] that a convention scores."""
        labels = rule(how.labels)
        chosen = None if labels.tests_all else self.shows_seen
        return fold(self.total(chosen, weights), self.rows, how.labels, dataset, step)


def fold(counts: np.ndarray, rows: Sequence[int], labels: str, dataset: Dataset, step: Step, use: str = "test") -> np.ndarray:
    """Counts [rows, C] as a square matrix [C, C]: each row goes to the label its class has in a view, or nowhere if ignored.

    Args:
        counts: int [len(rows), C].
        rows: class id of each row.
        labels: name of the label rule.
        dataset, step: decide what is background, old and future.
        use: "test" or "validation".
    """
    order = (*step.seen, *(c for c in range(1, len(dataset.classes)) if c not in step.seen))
    table = labels_by_class(rule(labels).view(use, dataset), len(dataset.classes), order, step)
    out = np.zeros((counts.shape[1], counts.shape[1]), counts.dtype)
    for row, c in zip(counts, rows, strict=True):
        label = table[c]
        if label < out.shape[0]:
            out[label] += row
    return out


def score(counts: Counts, how: Convention, dataset: Dataset, step: Step, weights: np.ndarray | None = None) -> np.ndarray:
    """IoU of each seen class in channel order, float64 [C], NaN where the convention leaves the class out of means."""
    iou, _ = mean_iou(counts.matrix(how, dataset, step, weights), how.absent, how.epsilon)
    if not how.background:
        iou = iou.copy()
        iou[0] = np.nan
    return iou


def old_new_all(iou: np.ndarray, n_first: int, how: Convention = CONVENTIONS["default"]) -> dict[str, float]:
    """Means of an IoU vector [C]: the first step's classes ("old", background among them if it counts), those added since ("new"), "all".

    Args:
        iou: NaN where a class is left out.
        n_first: channels of step 0, background included.
        how: says whether background is an old class.

    Source: spec/protocol.md section 9.1.
    """
    return {"old": mean(iou[0 if how.background_is_old else 1 : n_first]), "new": mean(iou[n_first:]), "all": mean(iou)}


def write_counts(path: Path, counts: Counts) -> None:
    """Counts as a compressed npz file."""
    np.savez_compressed(
        path, images=np.array(counts.images), shows_seen=counts.shows_seen, rows=np.array(counts.rows), n_classes=np.array(counts.n_classes),
        entries=counts.entries, values=counts.values,
    )  # fmt: skip


def read_counts(path: Path) -> Counts:
    """Counts that `write_counts` wrote."""
    try:
        with np.load(path, allow_pickle=False) as z:
            rows = tuple(int(c) for c in z["rows"])
            return Counts(tuple(map(str, z["images"])), z["shows_seen"], rows, int(z["n_classes"]), z["entries"], z["values"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cut off or damaged ({error}); delete the folder {path.parent} and run the same command again") from None
