"""What a row's footnotes say, and which rows may be ranked with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
from pydantic import JsonValue

from bench.report.collect import Chain, Result
from bench.store.changes import files_line

SMOKE = "smoke run: two iterations a step, the numbers mean nothing"
APART = ("seed", "parent")
"""Inputs in which the jobs of several seeds differ by nature."""


class Conditions(NamedTuple):
    """What two rows must share to share a rank: the network, the number of exemplars kept, the kind of device
    and the version of torch."""

    network: str = ""
    memory: int = 0
    device: str = ""
    torch: str = ""

    @property
    def on(self) -> str:
        """Device and torch in words: "a GPU, torch 2.6.0"."""
        devices = " and ".join(DEVICES.get(word, word) for word in self.device.split(" / "))
        return f"{devices}, torch {self.torch or 'of unknown version'}"


DEVICES = {"": "an unknown device", "cpu": "a CPU", "cuda": "a GPU"}


def conditions(chain: Chain) -> Conditions:
    """Those of a row."""
    return Conditions(chain.network, chain.memory, chain.device, chain.torch)


def usual_conditions(chains: Iterable[Chain]) -> Conditions:
    """The conditions that most rows have; of equals the smaller memory, then the earlier row."""
    count = Counter(conditions(chain) for chain in chains if not chain.at_once and chain.finals)
    return min(count, key=lambda c: (-count[c], c.memory), default=Conditions())


def usual_driver(chains: Iterable[Chain]) -> str:
    """The GPU driver that most rows have; of equals the earlier row's."""
    count = Counter(chain.driver for chain in chains if chain.driver)
    return max(count, key=lambda driver: count[driver], default="")


def footnotes(chain: Chain, usual: Conditions, means: pd.DataFrame, driver: str = "") -> list[str]:
    """Footnotes of a row: the method's own, what keeps it out of the ranking, and what is not finished.

    Args:
        chain: the row.
        usual: conditions of most rows.
        means: mIoU all after each step of each seed.
        driver: of most rows' GPUs.
    """
    notes = list(chain.footnotes)
    network, memory, *on = usual
    verdict = "" if chain.at_once else ": not ranked with them"
    if network and chain.network != network:
        notes.append(f"network {chain.network}, most rows have {network}{verdict}")
    if network and chain.memory != memory and not chain.at_once:
        notes.append(f"keeps {chain.memory or 'no'} exemplars, most rows {memory or 'none'}{verdict}")
    if network and chain.behind and [chain.device, chain.torch] != on:
        notes.append(f"measured on {conditions(chain).on}; most rows on {usual.on}{verdict}")
    elif chain.driver and chain.driver != driver:
        notes.append(f"GPU driver {chain.driver}, most rows {driver}")
    if changed := files_line([result.change.files for result in chain.results], "its"):
        notes.append(changed)
    if any(result.inputs.smoke for result in chain.results):
        notes.append(SMOKE)
    if differing := _differing(chain):
        notes.append(f"its seeds were not trained alike: {', '.join(differing)} differ")
    short = [seed for seed in chain.seeds if len(chain.by_seed.get(seed, ())) < chain.steps]
    if short:
        notes.append(f"not finished: {', '.join(_so_far(chain, seed, means) for seed in short)}")
    if chain.stale:
        places = ", ".join(f"seed {result.seed} step {result.step}" for result in chain.stale)
        notes.append(f"left out, since trained under earlier settings: {places}")
    return notes


def _so_far(chain: Chain, seed: int, means: pd.DataFrame) -> str:
    """ "seed 1 (2 of 3 steps, all 61.3 after step 1)": what is there of a chain."""
    done = len(chain.by_seed.get(seed, ()))
    mine = means[(means["method"] == chain.label) & (means["seed"] == seed)]
    values = list(zip(mine["step"], mine["value"], strict=True))
    last = "".join(f", all {value:.1f} after step {step}" for step, value in values[-1:])
    return f"seed {seed} ({done} of {chain.steps} steps{last})"


def _differing(chain: Chain) -> list[str]:
    """Names of the inputs in which jobs of the averaged seeds differ at any step, those of `APART` aside."""
    found: set[str] = set()
    for step in range(chain.steps):
        results = [result for final in chain.finals for result in chain.by_seed[final.seed]]
        jobs = [_inputs(result) for result in results if result.step == step]
        names = {name for job in jobs for name in job}
        found |= {name for name in names if any(job.get(name) != jobs[0].get(name) for job in jobs)}
    return sorted(found)


def _inputs(result: Result) -> dict[str, JsonValue]:
    """A job's inputs by dotted name: "method.distillation", "training.lr"."""
    inputs = result.inputs.model_dump(mode="json", exclude=set(APART))
    method = inputs["method"]
    settings = method.pop("settings")
    return _flat({**inputs, "method": {**method, **settings}})


def _flat(values: dict[str, JsonValue], prefix: str = "") -> dict[str, JsonValue]:
    """Nested values by dotted name."""
    flat: dict[str, JsonValue] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
