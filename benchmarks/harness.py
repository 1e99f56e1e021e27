"""What the harness costs over the bare loop: same network, same losses, same batches; the bare loop has its data in memory.

    python benchmarks/harness.py [--threads 2] [--rounds 5]

The harness side is a whole job as `bench run` trains it: decoding (cached after the first epoch), cropping, batching, loss logs, progress
and checkpoints, on a CPU with deterministic algorithms only; the bare loop is without that constraint. The data set is shapes, the
network the small one (on a GPU too).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from side_by_side import measure, show

from bench.launch import record
from bench.plan import make_plan
from bench.registry import method
from bench.step import StepJob, prepare_process
from bench.store import Store
from bench.train import Trainer

EPOCHS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        plan = make_plan(["shapes-6-2"], ["joint"], overrides=[f"first_epochs={EPOCHS}"])
        store = Store(Path(folder) / "results")
        store.make()
        key, job = next(iter(plan.jobs.items()))
        store.open_work(key, record(job, plan))
        step = StepJob(store, key)
        spec = method(job.method)
        config = spec.config(**job.settings)
        step.data = step.load_data(config)
        step.method = spec.build(config)
        step.attach(spec.classifier)
        step.trainer = Trainer(step.method, 0, step.device, config.precision, step.journal.iteration, step.save)
        step.data.prepare = step.trainer.batch
        step.best = None
        step.method.start_step()
        (phase,) = step.method.phases()
        kept = [[dict(raw) for raw in step.method.batches(epoch)] for epoch in range(EPOCHS)]
        n = sum(map(len, kept))

        def harness() -> None:
            prepare_process()
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
                        loss = sum(phase.losses(step.trainer.batch(raw)).values())
                    loss.backward()
                    optimiser.step()
                    done += 1
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        print(f"{n} iterations of {config.batch_size} images, crop {config.crop}, {step.device}, {torch.get_num_threads()} threads")
        show(measure({"bare loop": bare, "harness": harness}, args.rounds), "bare loop")


if __name__ == "__main__":
    main()
