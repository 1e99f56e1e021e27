"""What the harness costs over the bare loop: same network, same losses, same batches; the bare loop has its
data in memory.

    python benchmarks/harness.py [--threads 1] [--rounds 5]

The harness side is a whole job as `bench run` trains it: decoding (cached after the first epoch), cropping,
batching, loss logs, progress and checkpoints, on a CPU with deterministic algorithms only; the bare loop is
without that constraint. The data set is shapes, the network the small one (on a GPU too).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from open_jobs import one_job
from side_by_side import measure, show

from bench.train.session import prepare_process

EPOCHS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    overrides = [f"first_epochs={EPOCHS}", f"threads={args.threads}"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        step = one_job(Path(folder), "shapes-6-2", "joint", overrides)
        step.begin()
        step.method.setup()
        (phase,) = step.method.phases()
        kept = [[dict(raw) for raw in step.method.batches(epoch)] for epoch in range(EPOCHS)]
        n = sum(map(len, kept))
        config, device = step.method.config, step.trainer.device

        def harness() -> None:
            prepare_process(device, args.threads)
            step.trainer.run(0, phase)

        def bare() -> None:
            torch.use_deterministic_algorithms(False)
            network = step.method.network
            optimiser = step.trainer.new_optimiser(phase)
            network.train()
            done = 0
            for epoch in kept:
                for raw in epoch:
                    for group in optimiser.param_groups:
                        group["lr"] = phase.rate(group["base_lr"], done, n)
                    optimiser.zero_grad(set_to_none=True)
                    with step.trainer.autocast():
                        loss: Any = sum(phase.losses(step.trainer.batch(raw)).values())
                    loss.backward()
                    optimiser.step()
                    done += 1
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        print(
            f"{n} iterations of {config.batch_size} images, crop {config.crop}, {device}, "
            f"{torch.get_num_threads()} threads"
        )
        show(measure({"bare loop": bare, "harness": harness}, args.rounds), "bare loop")
        step.close()


if __name__ == "__main__":
    main()
