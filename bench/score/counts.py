"""Confusion counts of each test image: kept by one pass; every convention is a function of them.

Rows are all classes of the data set, columns the predicted classes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.data.dataset import Dataset
from bench.errors import UserError
from bench.protocol.labels import labels_by_class, rule
from bench.protocol.protocol import Step
from bench.score.conventions import Convention


@dataclass(frozen=True)
class Counts:
    """Confusion counts of each test image after one step.

    Attributes:
        images: names of the test images, in list order.
        shows_seen: bool [N]: the image shows a class learned so far, in its whole mask (not only in the
            crop).
        rows: class ids of the rows: seen classes in channel order, then all others ascending.
        n_classes: number of columns, the channels of the network in label space.
        entries: int32 [n, 3], (image, row, column) of every count that is not 0.
        values: int64 [n], the counts.

    Example:
        >>> entries = np.array([[0, 0, 0], [0, 1, 1], [1, 1, 0]])  # image, true and predicted class
        >>> counts = Counts(("a", "b"), np.array([True, True]), (0, 1), 2, entries, np.array([6, 2, 1]))
        >>> counts.total().tolist()
        [[6, 0], [1, 2]]
        >>> counts.total(np.array([True, False])).tolist()  # image a alone
        [[6, 0], [0, 2]]
    """

    images: tuple[str, ...]
    shows_seen: np.ndarray
    rows: tuple[int, ...]
    n_classes: int
    entries: np.ndarray
    values: np.ndarray

    def total(self, chosen: np.ndarray | None = None, weights: np.ndarray | None = None) -> np.ndarray:
        """Summed counts, int64 [rows, columns]; of `chosen` images (bool [N]), `weights` [N] times each."""
        image, row, column = self.entries.T
        values = self.values if weights is None else self.values * weights[image]
        keep = slice(None) if chosen is None else chosen[image]
        out = np.zeros((len(self.rows), self.n_classes), np.int64)
        np.add.at(out, (row[keep], column[keep]), values[keep])
        return out

    def matrix(
        self, how: Convention, dataset: Dataset, step: Step, weights: np.ndarray | None = None
    ) -> np.ndarray:
        """The square matrix [C, C] that a convention scores.

        Example:
            >>> from bench.data.dataset import load_dataset
            >>> from bench.score.conventions import convention
            >>> entries = np.array([[0, 0, 0], [0, 1, 1], [0, 2, 1]])  # class 2 is still to come
            >>> counts = Counts(("a",), np.array([True]), (0, 1, 2), 2, entries, np.array([6, 2, 2]))
            >>> counts.matrix(convention("default"), load_dataset("voc"), Step(0, (1,), ())).tolist()
            [[6, 2], [0, 2]]
        """
        labels = rule(how.labels)
        chosen = None if labels.tests_all else self.shows_seen
        return fold(self.total(chosen, weights), self.rows, how.labels, dataset, step)


def fold(
    counts: np.ndarray, rows: Sequence[int], labels: str, dataset: Dataset, step: Step, use: str = "test"
) -> np.ndarray:
    """Counts [rows, C] as a square matrix [C, C]: each row goes to its class's label in a view, or nowhere.

    Args:
        counts: int [len(rows), C].
        rows: class id of each row.
        labels: name of the label rule.
        dataset, step: decide what is background, old and future.
        use: "test" or "validation".

    Example:
        >>> from bench.data.dataset import load_dataset
        >>> counts, voc, first = np.array([[6, 0], [0, 2], [0, 2]]), load_dataset("voc"), Step(0, (1,), ())
        >>> fold(counts, (0, 1, 2), "plop", voc, first).tolist()  # class 2 is still to come: background
        [[6, 2], [0, 2]]
        >>> fold(counts, (0, 1, 2), "mib", voc, first).tolist()  # … or ignored
        [[6, 0], [0, 2]]
    """
    order = (*step.seen, *(c for c in range(1, len(dataset.classes)) if c not in step.seen))
    table = labels_by_class(rule(labels).view(use, dataset), len(dataset.classes), order, step)
    out = np.zeros((counts.shape[1], counts.shape[1]), counts.dtype)
    for row, c in zip(counts, rows, strict=True):
        label = table[c]
        if label < out.shape[0]:
            out[label] += row
    return out


def write_counts(path: Path, counts: Counts) -> None:
    """Counts as a compressed npz file.

    Example:
        >>> counts = Counts(("a",), np.array([True]), (0, 1), 2, np.array([[0, 1, 1]]), np.array([4]))
        >>> write_counts(Path("confusion.npz"), counts)
        >>> read_counts(Path("confusion.npz")).total().tolist()
        [[0, 0], [0, 4]]
    """
    np.savez_compressed(
        path,
        images=np.array(counts.images),
        shows_seen=counts.shows_seen,
        rows=np.array(counts.rows),
        n_classes=np.array(counts.n_classes),
        entries=counts.entries,
        values=counts.values,
    )


def read_counts(path: Path) -> Counts:
    """Counts that `write_counts` wrote.

    Example:
        >>> Path("confusion.npz").write_text("cut off")
        7
        >>> read_counts(Path("confusion.npz"))
        Traceback (most recent call last):
        bench.errors.UserError: confusion.npz: cut off or damaged (...
    """
    try:
        with np.load(path, allow_pickle=False) as z:
            images, rows = tuple(map(str, z["images"])), tuple(int(c) for c in z["rows"])
            return Counts(images, z["shows_seen"], rows, int(z["n_classes"]), z["entries"], z["values"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        cure = f"delete the folder {path.parent} and run the same command again"
        raise UserError(f"{path}: cut off or damaged ({error}); {cure}") from None
