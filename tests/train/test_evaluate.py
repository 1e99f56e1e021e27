"""Counting on the device agrees with counting pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.train.evaluate import batch_counts


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
