"""Plans without data: a protocol of three steps on tensors, by class indexes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.data.index import ClassIndex
from bench.method.registry import METHODS, method
from bench.method.resolve import resolve
from bench.plan.make import make_plan
from bench.plan.plan import Chain, Plan
from bench.protocol.file import load
from bench.protocol.protocol import Protocol
from bench.testing.tensors import tensor_dataset

PROTOCOL = Protocol("tiny", tensor_dataset(7), "overlapped", ((1, 2), (3, 4), (5, 6)))
SHOWN = tuple(sum(1 << c for c in (i % 6 + 1, i % 4 + 1)) for i in range(90))
INDEX = ClassIndex(tuple(f"i{i}" for i in range(90)), SHOWN, "f" * 16)


def every_method() -> list[str]:
    """Methods that stand alone, and wrappers around two of them."""
    wrapping = [name for name in METHODS.known() if METHODS.find(name).cls.wraps]
    alone = [name for name in METHODS.known() if name not in wrapping]
    return [*alone, *(f"{name}+{base}" for name in wrapping for base in ("plop", "ewc"))]


def config_of(name: str, protocol: str, track: str = "published") -> Any:
    """What the recipes say of a method on a protocol; which values there are, its Config says."""
    return resolve(method(name), load(protocol), track).config


def plan_of(
    methods: Sequence[str],
    overrides: Sequence[str] = (),
    protocol: Protocol = PROTOCOL,
    train: ClassIndex = INDEX,
    test: ClassIndex = INDEX,
    **more: Any,
) -> Plan:
    """A plan without data, by class indexes alone."""
    indexes = {protocol.dataset.name: {"train": train, "test": test}}
    overrides = ["batch_size=4", *overrides]
    return make_plan([protocol], methods, "small", overrides=overrides, indexes=indexes, **more)


def chain_of(*arguments: Any, **more: Any) -> tuple[Plan, Chain]:
    plan = plan_of(*arguments, **more)
    return plan, plan.chains[0]
