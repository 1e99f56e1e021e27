"""An iteration of SSUL at step 1 whose teacher shares the frozen trunk, against one whose teacher is a whole
copy.

    python benchmarks/trunk.py [--network deeplab-resnet101] [--crop 257] [--batch 4] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from unittest import mock

import torch
from iterations import Runner
from side_by_side import measure, show

import bench
from bench.method.interface import Method
from bench.plan.make import make_plan
from bench.store.results import Store
from methods.ssul import SSUL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="deeplab-resnet101")
    parser.add_argument("--crop", type=int, default=257)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    overrides = [f"network={args.network}", f"crop={args.crop}", f"batch_size={args.batch}", "saliency=all"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = bench.run("shapes-6-2", ["ssul"], cluster="inline", set=overrides, smoke=True)
        if not run.outcome.ok:
            raise SystemExit(f"a smoke run failed: {run.outcome}")
        plan = make_plan(["shapes-6-2"], ["ssul"], overrides=overrides, smoke=True)
        key, store = plan.chains[0].keys[1], Store(smoke=True)
        shared = Runner(store, key, plan)
        with mock.patch.object(SSUL, "make_teacher", Method.make_teacher):
            copied = Runner(store, key, plan)
        print(f"{args.network}, {args.batch} x {args.crop}, {torch.get_num_threads()} threads")
        ways = {"a whole copy": lambda: copied.iterate(0), "the same trunk": lambda: shared.iterate(0)}
        show(measure(ways, args.rounds), "a whole copy")


if __name__ == "__main__":
    main()
