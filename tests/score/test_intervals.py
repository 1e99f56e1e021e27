"""Bootstrap intervals against scipy's, and against what they claim: nineteen in twenty hold the true
value."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from bench.protocol.protocol import Protocol
from bench.score.bootstrap import interval
from bench.score.conventions import CONVENTIONS, convention
from bench.score.counts import Counts
from bench.testing.tensors import tensor_dataset

PROTOCOL = Protocol("three", tensor_dataset(4), "overlapped", ((2, 1), (3,)))
STEP = PROTOCOL.step(1)
"""All classes are seen, so that every convention has the same pixels; they differ in what they count."""
ROWS = STEP.seen


def results(rng: np.random.Generator, images: int, seeds: int) -> np.ndarray:
    """Confusion of each result and image, [seeds, images, 4, 4]; what is hard for one seed is so for all."""
    pixels = 40 * rng.dirichlet(np.full(4, 0.7), images)
    easy = rng.beta(2, 2, images)
    found = np.empty((seeds, images, 4, 4), np.int64)
    for seed in range(seeds):
        skill = np.clip(easy + 0.05 * rng.normal(size=images), 0.02, 0.98)[:, None, None]
        likely = (1 - skill) / 4 + skill * np.eye(4)
        found[seed] = rng.poisson(pixels[:, :, None] * likely)
    return found


def counts_of(matrices: np.ndarray) -> Counts:
    """The same as the harness keeps it, [images, 4, 4]."""
    n = len(matrices)
    entries = np.argwhere(matrices).astype(np.int32)
    names = tuple(f"image{i}" for i in range(n))
    return Counts(names, np.ones(n, bool), ROWS, 4, entries, matrices[matrices > 0])


def mean_iou_of(matrices: np.ndarray, background: bool = True) -> np.ndarray:
    """Mean IoU of confusion matrices [..., C, C]."""
    hit = np.diagonal(matrices, axis1=-2, axis2=-1)
    iou = hit / (matrices.sum(-1) + matrices.sum(-2) - hit)
    return iou[..., 0 if background else 1 :].mean(-1)


def by_scipy(found: np.ndarray, background: bool) -> tuple[float, float]:
    """Scipy's interval of the mean over seeds of the mean IoU, of draws of images that all seeds share."""
    images = found.shape[1]

    def statistic(chosen: np.ndarray, axis: int) -> np.ndarray:
        assert axis in (-1, chosen.ndim - 1)
        weights = np.apply_along_axis(np.bincount, -1, chosen.astype(int), minlength=images)
        summed = np.einsum("...n,snij->...sij", weights, found)
        return 100 * mean_iou_of(summed, background).mean(-1)

    more = {"n_resamples": 2000, "method": "percentile", "confidence_level": 0.95}
    drawn = bootstrap((np.arange(images),), statistic, rng=np.random.default_rng(0), **more)
    return drawn.confidence_interval.low, drawn.confidence_interval.high


@pytest.mark.parametrize("name", CONVENTIONS.known())
@pytest.mark.parametrize(("images", "seeds"), [(40, 1), (25, 4), (90, 3)])
def test_intervals_are_scipys(name: str, images: int, seeds: int) -> None:
    """On average over ten sets of images: both are of draws."""
    how, wider, higher = convention(name), [], []
    for number in range(10):
        found = results(np.random.default_rng(number), images, seeds)
        low, high = by_scipy(found, how.background)
        ours = interval([counts_of(one) for one in found], how, PROTOCOL.dataset, [STEP] * seeds)
        assert ours is not None
        wider.append((ours[1] - ours[0]) / (high - low))
        higher.append((ours[1] + ours[0] - high - low) / (high - low))
    assert np.mean(wider) == pytest.approx(1, abs=0.05)
    assert np.mean(higher) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("seeds", [1, 3])
def test_nineteen_in_twenty_hold_the_true_value(seeds: int) -> None:
    """Two hundred experiments, each with images drawn from one population whose mean IoU is known; the seeds
    of an experiment are tested on the same images."""
    rng, how = np.random.default_rng(seeds), convention("default")
    population = results(rng, 20_000, seeds)
    true = 100 * float(mean_iou_of(population.sum(1)).mean())
    inside = []
    for _ in range(200):
        chosen = rng.choice(population.shape[1], 200, replace=False)
        counts = [counts_of(one[chosen]) for one in population]
        found = interval(counts, how, PROTOCOL.dataset, [STEP] * seeds)
        assert found is not None
        inside.append(found[0] <= true <= found[1])
    assert 0.93 <= np.mean(inside) <= 0.97
