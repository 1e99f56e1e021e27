"""PLOP: Local POD on maps that are not square."""

from __future__ import annotations

import pytest
import torch

from methods.plop import local_pod_embedding


@pytest.mark.parametrize("shape", [(8, 10), (14, 12), (12, 14)])
def test_windows_have_the_same_side_on_both_axes_and_are_clipped_at_the_edge(shape: tuple[int, int]) -> None:
    features = torch.rand(2, 3, *shape)
    found = local_pod_embedding(features, (4,)).split(
        [3 * (len(r) + len(c)) for r, c in _windows(shape)], dim=1
    )
    for strips, (rows, columns) in zip(found, _windows(shape), strict=True):
        window = features[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        torch.testing.assert_close(
            strips, torch.cat([window.mean(3).flatten(1), window.mean(2).flatten(1)], dim=1)
        )


def _windows(shape: tuple[int, int]) -> list[tuple[range, range]]:
    height, width = shape
    side = width // 4
    return [
        (range(i * side, min((i + 1) * side, height)), range(j * side, (j + 1) * side))
        for i in range(4)
        for j in range(4)
    ]


@pytest.mark.parametrize("shape", [(6, 8), (3, 3), (7, 12)])
def test_a_window_without_a_pixel_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"scale 4 has windows without a pixel on a map of \d+ x \d+"):
        local_pod_embedding(torch.rand(1, 2, *shape))
