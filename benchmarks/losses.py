"""Seconds of losses, forward and backward, against the plain form that their formulas suggest, written
here.

    python benchmarks/losses.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from side_by_side import measure, show
from torch import Tensor

from methods.plop import local_pod_distance, local_pod_embedding


def both_ways(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Callable[[], None]:
    """The loss and its backward pass."""

    def run() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return run


def local_pod(channels: int, side: int) -> None:
    """Local POD of a layer's maps as a job has them: channels last."""
    shape = (4, channels, side, side)
    old, new = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    new.requires_grad_()

    def plain(new: Tensor) -> Tensor:
        difference = local_pod_embedding(new.square()) - local_pod_embedding(old.square())
        return torch.linalg.vector_norm(difference, dim=1).mean()

    print(f"Local POD, maps {shape}, channels last")
    ways = {"window by window": plain, "pooled once": lambda new: local_pod_distance(old, new).mean()}
    show(measure({name: both_ways(way, new) for name, way in ways.items()}), "window by window")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    for channels, side in ((256, 128), (1024, 32), (2048, 32)):
        local_pod(channels, side)


if __name__ == "__main__":
    main()
