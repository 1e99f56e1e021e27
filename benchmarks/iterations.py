"""Seconds and memory of an iteration of each method at step 1, against fine-tuning, all in one run.

    python benchmarks/iterations.py [--methods ft,mib,plop] [--protocol shapes-6-2] [--track small] [--set
    KEY=VALUE]

Step 0 of every family is trained for two iterations (--smoke) first. Memory on a GPU is the peak of an
iteration; on the CPU it is what the loss's graph holds: the tensors saved for the backward pass, besides
parameters.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from open_jobs import every_method, opened

import bench
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.store.results import Store


class Saved:
    """Bytes that a forward pass keeps for its backward pass."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.bytes[storage.data_ptr()] = storage.nbytes()
        return tensor


class Runner:
    """One method at step 1, an iteration at a time."""

    def __init__(self, store: Store, key: str, plan: Plan) -> None:
        self.step = opened(plan, key, store)
        self.trainer = self.step.trainer
        self.step.begin()
        self.step.method.setup()
        self.phase = self.step.method.phases()[-1]
        self.trainer.optimiser = self.trainer.new_optimiser(self.phase)
        self.raw = list(self.step.method.batches(0))
        self.step.method.train_mode()

    def iterate(self, k: int) -> float:
        begin = time.perf_counter()
        self.trainer.iteration(self.phase, dict(self.raw[k % len(self.raw)]), k, 1000)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def memory(self) -> int:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.iterate(0)
            return torch.cuda.max_memory_allocated()
        saved = Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            self.iterate(0)
        return sum(saved.bytes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="")
    parser.add_argument("--protocol", default="shapes-6-2")
    parser.add_argument("--track", default="small")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--data-root")
    args = parser.parse_args()
    names = args.methods.split(",") if args.methods else every_method(at_once=False)
    names = ["ft", *(name for name in names if name != "ft")]
    root = args.data_root and str(Path(args.data_root).resolve())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = bench.run(
            args.protocol,
            names,
            cluster="inline",
            set=args.overrides,
            track=args.track,
            data_root=root,
            smoke=True,
        )
        if not run.outcome.ok:
            raise SystemExit(f"a smoke run failed: {run.outcome}")
        plan = make_plan(
            [args.protocol], names, overrides=args.overrides, track=args.track, data_root=root, smoke=True
        )
        store = Store(smoke=True)
        runners = {chain.method: Runner(store, chain.keys[1], plan) for chain in plan.chains}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for k in range(args.rounds + 3):
            for name, runner in runners.items():
                seconds = runner.iterate(k)
                if k >= 3:
                    times[name].append(seconds)
        first = next(iter(runners))
        base, base_memory = times[first], runners[first].memory()
        print(
            f"{args.protocol}, {args.track}, {torch.get_num_threads()} threads, "
            f"{runners[first].trainer.device}; an iteration at step 1"
        )
        print(f"{'method':24s} {'ms':>8s} {'time / FT':>10s} {'memory / FT':>12s}")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
            memory = runners[name].memory() / base_memory
            print(f"{name:24s} {statistics.median(values) * 1000:8.1f} {ratio:10.2f} {memory:12.2f}")


if __name__ == "__main__":
    main()
