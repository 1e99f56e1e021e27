"""Several processes that train one step together: one a GPU, the batch shared among them."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def start() -> tuple[int, int]:
    """Join the group if the launcher (submitit, torchrun) started several processes. Returns (rank, world
    size)."""
    rank, world, local = _placement()
    if world > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=rank, world_size=world)
    return rank, world


def _placement() -> tuple[int, int, int]:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return 0, 1, 0
    import submitit

    environment = submitit.helpers.TorchDistributedEnvironment()
    if environment.world_size > 1:
        environment.export(set_cuda_visible_devices=False)
    return environment.rank, environment.world_size, environment.local_rank


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes; changed in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over all processes; changed in place."""
    return summed(tensor).div_(world_size())


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


class _Sum(torch.autograd.Function):
    """The sum over all processes, with its gradient: each process's loss counts."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return summed(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return summed(gradient.clone(memory_format=torch.contiguous_format))


def summed_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, through which gradients flow as if one process held all of it."""
    return _Sum.apply(tensor)


def barrier() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        dist.barrier()
