"""Jobs for benchmarks: opened through the one door, by `open_job`, as every job is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.errors import UserError
from bench.method.registry import METHODS, method, method_names
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.store.results import Store
from bench.train.session import Session, open_job


def every_method(at_once: bool = True) -> list[str]:
    """Every method that stands alone, and every wrapper around MiB and PLOP."""
    alone = METHODS.candidates("*")
    wrappers = [name for name in method_names() if name not in alone]
    found = [name for name in alone if at_once or not method(name).cls.at_once]
    for wrapper in wrappers:
        for base in ("mib", "plop"):
            try:
                found.append(method(f"{wrapper}+{base}").name)
            except UserError:
                continue
    return found


def one_job(folder: Path, protocol: str, name: str, overrides: Sequence[str]) -> Session:
    """The first job of a plan, open."""
    plan = make_plan([protocol], [name], overrides=overrides)
    return opened(plan, next(iter(plan.jobs)), Store(folder / "results"))


def opened(plan: Plan, key: str, store: Store) -> Session:
    """A job of a plan, open; its parent must be done."""
    store.make()
    store.open_work(plan.record(key))
    return open_job(store.record(key), store)
