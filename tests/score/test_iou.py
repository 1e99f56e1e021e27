from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bench.data.dataset import load_dataset
from bench.errors import UserError
from bench.protocol import Step
from bench.score import counts as counting
from bench.score import iou as metrics
from bench.score.conventions import convention
from bench.score.counts import Counts

VOC = load_dataset("voc")
STEP = Step(1, (3,), (1, 2))
"""Background, classes 1 and 2 learned before, class 3 new: four channels."""


def counts_of(labels: np.ndarray, predictions: np.ndarray, shows_seen: list[bool]) -> Counts:
    """Counts of images of class ids [N, P] and predicted channels [N, P]."""
    rows = (*STEP.seen, *(c for c in range(1, 21) if c not in STEP.seen))
    entries: dict[tuple[int, int, int], int] = {}
    for i, (label, predicted) in enumerate(zip(labels, predictions, strict=True)):
        for a, b in zip(label, predicted, strict=True):
            if a != 255:
                key = (i, rows.index(a), int(b))
                entries[key] = entries.get(key, 0) + 1
    names = tuple(f"image{i}" for i in range(len(labels)))
    where = np.array(list(entries), np.int32).reshape(-1, 3)
    return Counts(
        names, np.array(shows_seen), rows, STEP.n_classes, where, np.array(list(entries.values()), np.int64)
    )


LABELS = np.array([[0, 1, 1, 3, 255], [0, 0, 5, 5, 2], [7, 7, 0, 0, 0]])
PREDICTIONS = np.array([[0, 1, 0, 3, 2], [0, 1, 0, 3, 2], [0, 1, 0, 0, 0]])
COUNTS = counts_of(LABELS, PREDICTIONS, [True, True, False])


def iou(hit: float, true: float, predicted: float) -> float:
    return hit / (true + predicted - hit + 1e-6)


def test_default_counts_future_classes_as_background_and_leaves_unseen_images_out() -> None:
    scored = metrics.score(COUNTS, convention("default"), VOC, STEP)
    # Images 0 and 1; class 5 is background: true background 1 + 2 + 2 pixels, hit 3, predicted 4.
    assert scored == pytest.approx([iou(3, 5, 4), iou(1, 2, 2), iou(1, 1, 1), iou(1, 1, 2)])


def test_mib_ignores_future_classes_and_leaves_background_out_of_the_mean() -> None:
    scored = metrics.score(COUNTS, convention("mib"), VOC, STEP)
    assert np.isnan(scored[0])
    assert scored[1:] == pytest.approx([iou(1, 2, 2), iou(1, 1, 1), iou(1, 1, 1)])


def test_ssul_keeps_all_images_and_ignores_future_classes() -> None:
    scored = metrics.score(COUNTS, convention("ssul"), VOC, STEP)
    assert scored == pytest.approx([iou(5, 6, 6), iou(1, 2, 2), iou(1, 1, 1), iou(1, 1, 1)])


def test_absent_classes_are_left_out_or_count_as_zero() -> None:
    only_first = counts_of(LABELS[:1], PREDICTIONS[:1], [True])  # class 2 has no pixel
    assert np.isnan(metrics.score(only_first, convention("default"), VOC, STEP)[2])
    assert metrics.score(only_first, convention("ssul"), VOC, STEP)[2] == 0
    assert (
        metrics.score(only_first, convention("mbs"), VOC, STEP)[2] == 0
    )  # old_new_all leaves it out of "all"


def test_ade_background_is_ignored_by_mib_and_kept_by_default() -> None:
    ade = load_dataset("ade")
    rows = (*STEP.seen, *range(4, 151))
    one = Counts(
        ("a",),
        np.array([True]),
        rows,
        4,
        np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1]], np.int32),
        np.array([5, 5, 10]),
    )
    assert metrics.score(one, convention("mib"), ade, STEP)[1] == pytest.approx(1)
    assert metrics.score(one, convention("default"), ade, STEP)[:2] == pytest.approx([0.5, 10 / 15])


def test_old_new_all() -> None:
    means = metrics.old_new_all(np.array([0.9, 0.5, np.nan, 0.1]), 3)
    assert means == pytest.approx({"old": 0.7, "new": 0.1, "all": 0.5})
    assert np.isnan(metrics.old_new_all(np.array([0.9, 0.5]), 2)["new"])


def test_mbs_leaves_zeros_out_of_all_and_counts_them_in_old_and_new() -> None:
    means = metrics.old_new_all(np.array([0.9, 0.5, 0, 0.1, 0]), 3, convention("mbs"))
    assert means == pytest.approx(
        {"old": 0.25, "new": 0.05, "all": 0.5}
    )  # background counts in all, but is not old
    assert np.isnan(metrics.old_new_all(np.zeros(3), 2, convention("mbs"))["all"])


def test_mbs_means_are_those_of_the_authors(shared: Path) -> None:
    """The counts, IoUs and means of a whole chain of their trainer, as their own code told them."""
    folder = shared / "golden/chain-mbs"
    for case in json.loads((folder / "manifest.json").read_text()):
        recorded, how = np.load(folder / case["file"]), convention("mbs")
        n_first, last = len(recorded["confusion_step_0"]), len(case["params"]["classes_per_step"]) - 1
        for t in range(last + 1):
            found = metrics.class_iou(recorded[f"confusion_step_{t}"], how.epsilon)
            assert found == pytest.approx(recorded[f"class_iou_step_{t}"], abs=1e-6)
            means = metrics.old_new_all(found, n_first, how)
            assert means["all"] == pytest.approx(float(recorded[f"mean_iou_step_{t}"]), abs=1e-6)
        assert means["old"] == pytest.approx(float(recorded["mean_iou_old"]), abs=1e-6)
        assert means["new"] == pytest.approx(float(recorded["mean_iou_new"]), abs=1e-6)


def test_weights_count_an_image_several_times() -> None:
    twice = np.array([2, 1, 1])
    direct = counts_of(
        np.concatenate([LABELS, LABELS[:1]]),
        np.concatenate([PREDICTIONS, PREDICTIONS[:1]]),
        [True, True, False, True],
    )
    assert (
        COUNTS.matrix(convention("default"), VOC, STEP, twice)
        == direct.matrix(convention("default"), VOC, STEP)
    ).all()


def test_counts_survive_the_disk_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "confusion.npz"
    counting.write_counts(path, COUNTS)
    back = counting.read_counts(path)
    assert back.images == COUNTS.images
    assert back.rows == COUNTS.rows
    assert (back.total() == COUNTS.total()).all()
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"confusion\.npz: cut off or damaged"):
        counting.read_counts(path)


matrices = hnp.arrays(np.int64, st.integers(1, 6).map(lambda n: (n, n)), elements=st.integers(0, 50))


@given(matrices)
def test_iou_is_a_share(matrix: np.ndarray) -> None:
    found = metrics.class_iou(matrix)
    assert ((found >= 0) & (found <= 1)).all()


@given(matrices)
def test_iou_agrees_with_its_definition_pixel_by_pixel(matrix: np.ndarray) -> None:
    n = len(matrix)
    true, predicted = (m.repeat(matrix.ravel()) for m in np.divmod(np.arange(n * n), n))
    for c, value in enumerate(metrics.class_iou(matrix)):
        union = ((true == c) | (predicted == c)).sum()
        assert value == pytest.approx(((true == c) & (predicted == c)).sum() / (union + 1e-6))


@given(matrices, st.integers(0, 2**32 - 1))
def test_the_mean_does_not_depend_on_the_order_of_classes(matrix: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(matrix))
    a, b = metrics.mean_iou(matrix)[1], metrics.mean_iou(matrix[np.ix_(order, order)])[1]
    assert a == pytest.approx(b, nan_ok=True)


def test_unknown_convention_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'mib'"):
        convention("mibb")
