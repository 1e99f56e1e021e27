"""Counting on the device agrees with counting pixel by pixel, and a whole evaluation with scikit-learn's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predicted import opened
from sklearn.metrics import confusion_matrix
from torch import nn

from bench.protocol.labels import rule
from bench.protocol.protocol import Protocol
from bench.score.conventions import CONVENTIONS, convention
from bench.score.counts import Counts
from bench.score.iou import old_new_all, score
from bench.testing.tensors import tensor_dataset
from bench.train.evaluate import batch_counts, evaluate

PROTOCOL = Protocol("mixed", tensor_dataset(8), "overlapped", ((5, 2), (7,), (1, 4), (3, 6)))
"""The classes come in no order, and some are still to come in every step but the last."""
EVERYWHERE = (0, 1, 2, 3, 4, 5, 6, 7, 255)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_counts_agree_with_counting_pixel_by_pixel(images: int, rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(rows), 255], size=(images, 5, 7))
    predictions = rng.integers(0, columns, size=(images, 5, 7))
    counts = batch_counts(torch.from_numpy(labels), torch.from_numpy(predictions), rows, columns).numpy()
    expected = np.zeros((images, rows, columns), int)
    for i, y, x in np.ndindex(*labels.shape):
        if labels[i, y, x] != 255:
            expected[i, labels[i, y, x], predictions[i, y, x]] += 1
    assert (counts == expected).all()


# ---- a whole pass over the test images ---------------------------------------------------------------------


def given_images(n: int, side: int, index: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[set[int]]]:
    """Labels [N, S, S], predicted channels [N, S, S], and classes that each whole image shows.

    Some images show classes in their margin alone (never in the crop), some show only what is still to come.
    """
    rng, step = np.random.default_rng(seed), PROTOCOL.step(index)
    labels = np.stack([rng.choice(rng.choice(EVERYWHERE, 3), (side, side)) for _ in range(n)])
    future = [c for c in range(1, 8) if c not in step.seen]
    labels[0] = rng.choice([0, 255, *future], (side, side))
    labels[1] = 0
    predictions = rng.integers(0, step.n_classes, labels.shape)
    shows = [{int(c) for c in np.unique(one)} - {0, 255} for one in labels]
    shows[1] = {PROTOCOL.groups[0][0]}  # outside the crop
    return labels, predictions, shows


def of_images(counts: Counts) -> np.ndarray:
    """Counts image by image, [N, rows, columns]."""
    chosen = np.eye(len(counts.images), dtype=bool)
    return np.stack([counts.total(one) for one in chosen])


def by_scikit_learn(labels: np.ndarray, predictions: np.ndarray, index: int) -> np.ndarray:
    """Confusion of class ids, the seen ones in channel order and then the others: [rows, channels]."""
    seen = list(PROTOCOL.step(index).seen)
    rows = [*seen, *(c for c in range(8) if c not in seen)]
    kept = labels != 255
    if not kept.any():
        return np.zeros((len(rows), len(seen)), int)
    found = confusion_matrix(labels[kept], np.array(seen)[predictions[kept]], labels=rows)
    assert not found[:, len(seen) :].any()
    return found[:, : len(seen)]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("size", "side", "n"), [(2, 6, 7), (3, 9, 7), (4, 5, 4), (5, 16, 11), (16, 3, 9)])
def test_an_evaluation_agrees_with_scikit_learn(index: int, size: int, side: int, n: int) -> None:
    labels, predictions, shows = given_images(n, side, index, seed=n + side)
    trainer, data = opened(PROTOCOL, index, labels, predictions, shows, size)
    trainer.method.network.train()
    counts = evaluate(trainer, data)
    expected = [by_scikit_learn(y, p, index) for y, p in zip(labels, predictions, strict=True)]
    assert (of_images(counts) == expected).all()
    assert counts.images == tuple(f"t{i}" for i in range(n))
    seen = set(PROTOCOL.step(index).seen) - {0}
    assert counts.shows_seen.tolist() == [bool(s & seen) for s in shows]
    assert counts.shows_seen[1]
    assert bool(counts.shows_seen[0]) == (index == 3 and bool(shows[0]))
    assert trainer.method.network.modes == {False}


@pytest.mark.parametrize("size", [2, 3])
def test_some_images_only_and_in_any_order(size: int) -> None:
    labels, predictions, shows = given_images(9, 6, 1, seed=4)
    trainer, data = opened(PROTOCOL, 1, labels, predictions, shows, size)
    for positions in ([1, 2, 5, 8], [0, 3, 4, 6, 7]):
        counts = evaluate(trainer, data, data.test_images(positions), positions)
        expected = [by_scikit_learn(labels[p], predictions[p], 1) for p in positions]
        assert (of_images(counts) == expected).all()
        assert counts.images == tuple(f"t{p}" for p in positions)
        assert counts.shows_seen.tolist() == [bool(shows[p] & {5, 2, 7}) for p in positions]


def test_batches_in_any_order_are_filed_under_their_images() -> None:
    """As several processes meet them, each a share of every batch."""
    labels, predictions, shows = given_images(8, 6, 2, seed=5)
    trainer, data = opened(PROTOCOL, 2, labels, predictions, shows, 3)
    usual = evaluate(trainer, data)
    images = data.test_images(range(8))
    turned = [{k: v.flip(0) for k, v in batch.items()} for batch in reversed(images.batches)]
    counts = evaluate(trainer, data, replace(images, batches=tuple(turned)), range(8))
    assert (of_images(counts) == of_images(usual)).all()


VIEWS = {
    "default": ("0", "left out", "left out"), "eir": ("0", "left out", "zero"),
    "mib": ("ignored", "left out", "left out"), "ssul": ("ignored", "kept", "zero"),
    "mbs": ("ignored", "kept", "in all, if not zero"),
}  # fmt: skip
"""By convention: what pixels of future classes are, images without a seen class, classes without a pixel."""


def mean(values: np.ndarray, counted: np.ndarray) -> float:
    return float(values[counted].mean()) if counted.any() else float("nan")


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_convention_scores_what_scikit_learn_counts(name: str, index: int) -> None:
    labels, predictions, shows = given_images(12, 8, index, seed=index)
    counts = evaluate(*opened(PROTOCOL, index, labels, predictions, shows, 5))
    how, step = convention(name), PROTOCOL.step(index)
    future, unseen, absent = VIEWS[name]
    channel = np.full(256, -1)
    channel[: len(PROTOCOL.dataset.classes)] = 0 if future == "0" else -1
    channel[list(step.seen)] = range(step.n_classes)
    kept = np.array([unseen == "kept" or bool(s & set(step.seen)) for s in shows])
    assert kept.all() == (unseen == "kept")
    true, predicted = channel[labels[kept]].ravel(), predictions[kept].ravel()
    scored = true >= 0
    expected = confusion_matrix(true[scored], predicted[scored], labels=range(step.n_classes))
    assert (counts.matrix(how, PROTOCOL.dataset, step) == expected).all()
    hit, shown = np.diag(expected), expected.sum(1)
    iou = hit / np.maximum(expected.sum(0) + shown - hit, 1)
    counted = (shown > 0) if absent == "left out" else np.ones(step.n_classes, bool)
    counted[0] &= name != "mib"
    in_all = counted & (iou > 0) if name == "mbs" else counted
    in_old = counted.copy()
    in_old[0] &= name != "mbs"
    found = score(counts, how, PROTOCOL.dataset, step)
    assert found == pytest.approx(np.where(counted, iou, np.nan), abs=1e-6, nan_ok=True)
    assert old_new_all(found, 3, how) == pytest.approx(
        {"all": mean(iou, in_all), "old": mean(iou[:3], in_old[:3]), "new": mean(iou[3:], counted[3:])},
        abs=1e-6,
        nan_ok=True,
    )


def test_every_convention_is_met_above() -> None:
    assert set(VIEWS) == set(CONVENTIONS.known())
    for name, (_, unseen, _) in VIEWS.items():
        assert rule(convention(name).labels).tests_all == (unseen == "kept")


def test_own_modules_are_in_evaluation_mode_too() -> None:
    labels, predictions, shows = given_images(4, 6, 1, seed=6)
    trainer, data = opened(PROTOCOL, 1, labels, predictions, shows, 2)
    own = nn.Dropout().train()
    trainer.method.modules = {"own": own}
    evaluate(trainer, data)
    assert not own.training
