"""Batches: which images in which order, and the processes that read them.

A sample is drawn from (seed, epoch, position) alone, so batches are the same whatever the number of workers,
and an interrupted epoch is repeated exactly.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.data.cores import cores
from bench.data.images import Sample, Samples
from bench.errors import UserError
from bench.seeds import mix

__all__ = ["EpochSampler", "Loader", "Sample", "collate", "default_workers"]


def collate(samples: Sequence[Sample]) -> dict[str, Tensor | str]:
    """Samples stacked key by key into tensors; a sample that could not be read travels as its error."""
    for sample in samples:
        if "error" in sample:
            return {"error": str(sample["error"])}
    return {key: torch.from_numpy(np.stack([np.asarray(s[key]) for s in samples])) for key in samples[0]}


class EpochSampler:
    """Batches of (position, seed) of one epoch; the share of one process where several train together.

    Args:
        n: images.
        batch_size: over all processes.
        seed: of the order and of each sample.
        shuffle: draw the order anew each epoch.
        drop_last: leave out the last, incomplete batch.
        rank, world: this process among those that train together.
        limit: yield exactly so many batches, repeating images (a smoke run); None for all.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
    ) -> None:
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world, self.epoch = rank, world, 0
        self.done = 0  # batches that the next pass leaves out
        whole = n // batch_size if drop_last else -(-n // batch_size)
        self.n_batches = whole if limit is None else limit
        self.repeat = limit is not None

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        done, self.done = self.done, 0
        order = list(range(self.n))
        if self.shuffle:
            random.Random(mix(self.seed, "order", self.epoch)).shuffle(order)
        if self.repeat:  # a smoke run fills its few batches however few images there are
            size = self.n_batches * self.batch_size
            order = (order * (size // self.n + 1))[:size]
        for b in range(done, self.n_batches):
            batch = list(enumerate(order[b * self.batch_size : (b + 1) * self.batch_size]))[
                self.rank :: self.world
            ]
            if batch:  # the last one may have fewer images than there are processes
                yield [(i, mix(self.seed, self.epoch, b, k, i)) for k, i in batch]


def _leave_signals_to_the_job(worker: int) -> None:
    """Stopping or requeueing a job is for its main process to answer; its loaders end with it, or at its
    word."""
    for number in (signal.SIGINT, getattr(signal, "SIGUSR2", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Loader:
    """An epoch's batches as tensors; errors of worker processes surface as themselves.

    Whoever opens one closes it, or uses it as a context: that ends its processes at once.

    Args:
        dataset: yields a `Sample` for (position, seed).
        sampler: which ones, in batches.
        workers: processes that read; 0 reads in this one.
        pin: pin memory for copies to a GPU.
        persistent: workers wait for the next epoch; else they end with each pass.
    """

    def __init__(
        self,
        dataset: Samples,
        sampler: EpochSampler,
        workers: int = 0,
        pin: bool = False,
        persistent: bool = False,
    ) -> None:
        self.sampler = sampler
        self._persistent = persistent and workers > 0
        self._passes: list[Any] = []
        self._loader: DataLoader[Any] = DataLoader(
            cast(Dataset[Sample], dataset),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin,
            persistent_workers=self._persistent,
            worker_init_fn=_leave_signals_to_the_job,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.after(0)

    def after(self, done: int) -> Iterator[dict[str, Tensor]]:
        """A pass without its first `done` batches, which are not read."""
        # One draw a pass from the generator that dropout draws from too, whether or not there are workers and
        # whether or not they were there before: torch would draw only when it starts workers, and a resumed
        # step would end otherwise.
        torch.empty((), dtype=torch.int64).random_()
        self.sampler.done = done
        return self._pass()

    def _pass(self) -> Iterator[dict[str, Tensor]]:
        batches = iter(self._loader)
        if not any(batches is one for one in self._passes):
            self._passes.append(batches)
        try:
            for batch in batches:
                if "error" in batch:
                    raise UserError(batch["error"])
                yield batch
        finally:
            if not self._persistent:
                self._end(batches)

    def close(self) -> None:
        """End the worker processes now. The next pass starts others."""
        for batches in list(self._passes):
            self._end(batches)
        self._loader._iterator = None

    def _end(self, batches: Any) -> None:
        self._passes = [one for one in self._passes if one is not batches]
        shutdown = getattr(batches, "_shutdown_workers", None)  # torch has no public way
        if shutdown is not None:
            shutdown()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def default_workers(on_gpu: bool, processes: int = 1) -> int:
    """Loading processes: none where the CPU trains, else this process's share of the cores, 8 at most."""
    return max(1, min(8, cores() // processes)) if on_gpu else 0
