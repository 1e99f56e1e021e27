"""PLOP: Local POD on maps that are not square, and its distance against the embedding's."""

from __future__ import annotations

import pytest
import torch

from methods.plop import local_pod_distance, local_pod_embedding


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


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("side", "scales"),
    [(8, (1, 2, 4)), (12, (1, 2, 4)), (12, (3, 1)), (12, (2, 3)), (10, (1, 2, 4)), (6, (2,))],
)
def test_the_distance_is_that_of_the_embeddings(
    side: int, scales: tuple[int, ...], channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = torch.randn(2, 2, 3, side, side, dtype=torch.float64)
    old, new = (m.contiguous(memory_format=layout) for m in maps)

    def plain(new: torch.Tensor) -> torch.Tensor:
        embeddings = (local_pod_embedding(m.square(), scales) for m in (old, new))
        return torch.linalg.vector_norm(next(embeddings) - next(embeddings), dim=1)

    gradients = []
    for distance in (plain, lambda new: local_pod_distance(old, new, scales)):
        leaf = new.clone().requires_grad_()
        found = distance(leaf)
        torch.testing.assert_close(found, plain(new), rtol=1e-12, atol=0)
        (found * torch.tensor([1.0, 2.0])).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_equal_maps_have_no_distance_and_no_gradient() -> None:
    new = torch.randn(1, 2, 8, 8).requires_grad_()
    distance = local_pod_distance(new.detach(), new)
    distance.sum().backward()
    assert distance.item() == 0
    assert new.grad is not None
    assert (new.grad == 0).all()
