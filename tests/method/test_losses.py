"""The loss that every method starts from."""

from __future__ import annotations

import pytest
import torch

from bench.data.dataset import IGNORE
from bench.method import cross_entropy


@pytest.mark.parametrize("ignored", [0, 3, 8])
def test_ignored_pixels_count_in_the_divisor(ignored: int) -> None:
    logits = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    labels = torch.randint(0, 3, (1, 2, 4))
    labels.view(-1)[:ignored] = IGNORE
    chosen = logits.log_softmax(1)[0].flatten(1).T[range(ignored, 8), labels.view(-1)[ignored:]]
    torch.testing.assert_close(cross_entropy(logits, labels), -chosen.sum() / 8)
