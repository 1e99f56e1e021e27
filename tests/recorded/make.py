"""Makes what tests/test_recorded.py holds later versions against: a results folder of this format, and keys
of every method.

    python tests/recorded/make.py tests/recorded/format-2

The folder is made once a format and never again: that later versions find its jobs is the point. It holds a
smoke run (two iterations a step, eight test images) of some methods on shapes with a network of a few
kilobytes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import bench
import bench.testing.networks
from bench.errors import UserError
from bench.method.registry import METHODS, method, method_names
from bench.plan.make import make_plan
from bench.store.records import Environment, read_record, write_record

PROTOCOL = "shapes-6-2"
METHODS_RUN = ("joint", "mib", "ewc")
SETTINGS = (f"network={bench.testing.networks.TINY}", "crop=32", "batch_size=4")


def every_method() -> list[str]:
    """Every method, and every wrapper around MiB."""
    found = METHODS.candidates("*")
    for name in method_names():
        try:
            found += [] if name in found else [method(f"{name}+mib").name]
        except UserError:
            continue
    return sorted(found)


def keys() -> dict[str, list[str]]:
    """Keys of each method's steps on shapes, as its own recipe trains it in the track "small"."""
    plan = make_plan([PROTOCOL], every_method(), "small")
    return {chain.method: list(chain.keys) for chain in plan.chains}


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    if out.exists():
        raise SystemExit(f"{out}: is there; a recorded folder is never made again")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = bench.run(PROTOCOL, METHODS_RUN, set=SETTINGS, smoke=True, cluster="inline")
        assert run.outcome.ok, run.outcome
        results = out / "results"
        shutil.copytree("results", results, symlinks=True)
        for rest in ("work", "logs"):
            shutil.rmtree(results / "smoke" / rest, ignore_errors=True)
        for lock in results.rglob("*.lock"):
            lock.unlink()
        for path in results.rglob(Environment.file):
            where = read_record(path, Environment)
            assert where is not None
            write_record(path, where.model_copy(update={"host": "", "commit": None}))
        (out / "keys.json").write_text(json.dumps(keys(), indent=1) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{out}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
