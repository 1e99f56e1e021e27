"""Bootstrap intervals: many draws at once are what one draw at a time would give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.data.dataset import load_dataset
from bench.protocol import Step
from bench.score.bootstrap import draws, interval, percentile_interval
from bench.score.conventions import CONVENTIONS, convention
from bench.score.counts import Counts
from bench.score.iou import old_new_all, score

VOC = load_dataset("voc")
STEP = Step(1, (3,), (1, 2))
N = 30


def counts_of(seed: int) -> Counts:
    """Counts of 30 images; class 2 is never right, and few images show class 1."""
    rng = np.random.default_rng(seed)
    rows = (*STEP.seen, *(c for c in range(1, 21) if c not in STEP.seen))
    full = rng.integers(0, 50, (N, len(rows), 4)) * (rng.random((N, len(rows), 4)) < 0.3)
    full[:, 2, 2] = 0
    full[3:, 1] = 0
    entries = np.argwhere(full).astype(np.int32)
    names = tuple(f"image{i}" for i in range(N))
    return Counts(names, rng.random(N) < 0.8, rows, 4, entries, full[full > 0])


@pytest.mark.parametrize("name", CONVENTIONS.known())
def test_all_draws_at_once_are_each_draw_alone(name: str) -> None:
    counts, how = counts_of(0), convention(name)
    weights = np.random.default_rng(1).multinomial(N, np.full(N, 1 / N), size=20)
    alone = [old_new_all(score(counts, how, VOC, STEP, w), 3, how)["all"] for w in weights]
    assert draws(counts, how, VOC, STEP, weights) == pytest.approx(alone)


def test_an_interval_holds_the_mean_and_narrows_with_more_seeds() -> None:
    how = convention("default")
    seeds = [counts_of(seed) for seed in range(4)]
    first = interval(seeds[:1], how, VOC, [STEP])
    four = interval(seeds, how, VOC, [STEP] * 4)
    assert first is not None
    assert four is not None
    assert first[0] < 100 * old_new_all(score(seeds[0], how, VOC, STEP), 3, how)["all"] < first[1]
    assert four[1] - four[0] < first[1] - first[0]
    assert interval(seeds[:1], how, VOC, [STEP]) == first  # the draws are always the same


def test_results_on_other_images_have_no_interval() -> None:
    counts = counts_of(0)
    other = replace(counts, images=("x", *counts.images[1:]))
    assert interval([counts, other], convention("default"), VOC, [STEP] * 2) is None
    assert interval([], convention("default"), VOC, []) is None


def test_a_percentile_interval() -> None:
    assert percentile_interval(np.arange(1001)) == (25, 975)
    assert percentile_interval(np.arange(101), coverage=50) == (25, 75)
