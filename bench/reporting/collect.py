"""What a report is made of: the finished results of a folder, grouped into sections, and as one tidy table of numbers.

Only what belongs together is collected. A link that an earlier version of a recipe or protocol left (its job does not build on the job
that stands one step before it, or learned other classes) is set aside and named, never averaged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.errors import UserError, unknown
from bench.metrics import CONVENTIONS, old_new_all
from bench.recipe import TRACKS
from bench.store import Store, read_json

QUANTITIES = ("old", "new", "all", "avg")
COLUMNS = (
    "protocol", "data_set", "setting", "data", "track", "network", "method", "title", "memory", "seed", "step", "steps",
    "convention", "quantity", "channel", "class", "value", "key",
)  # fmt: skip
"""Of the tidy table and report.csv. `value` is in percent; `key` names the job or jobs that the value comes from."""


@dataclass(frozen=True)
class Result:
    """One finished step.

    Attributes:
        seed, step: of its chain.
        key: of its job.
        folder: its artifact.
        job, metrics: what the artifact's files of that name hold.
    """

    seed: int
    step: int
    key: str
    folder: Path
    job: Mapping[str, Any]
    metrics: Mapping[str, Any]

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Everything that decided the outcome."""
        return self.job["inputs"]

    @property
    def network(self) -> str:
        return str(self.inputs["training"]["network"])

    @property
    def memory(self) -> int:
        """Exemplars kept after this step."""
        return len(self.metrics["memory"])


@dataclass(frozen=True)
class Chain:
    """One method on one protocol, with every seed: a row of a table.

    Attributes:
        label: the method as results name it, overrides included.
        title: as tables print it.
        steps: jobs of a whole chain; 1 for a method that learns all classes at once.
        at_once: it does, on a protocol of several steps.
        footnotes: what a fair comparison must not hide.
        seeds: every seed that was asked for, also those of which nothing is finished.
        results: finished steps by seed and step.
        stale: finished steps of earlier settings, not used.
    """

    label: str
    title: str
    steps: int
    at_once: bool
    footnotes: tuple[str, ...]
    seeds: tuple[int, ...]
    results: tuple[Result, ...]
    stale: tuple[Result, ...]

    @cached_property
    def by_seed(self) -> dict[int, list[Result]]:
        """Finished steps of each seed, ascending."""
        found: dict[int, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.seed, []).append(result)
        return found

    @property
    def finals(self) -> list[Result]:
        """The last step of every seed that reached it."""
        return [result for result in self.results if result.step == self.steps - 1]

    @property
    def network(self) -> str:
        return " / ".join(sorted({result.network for result in self.finals or self.results}))

    @property
    def memory(self) -> int:
        """Exemplars kept, at most."""
        return max((result.memory for result in self.results), default=0)


@dataclass(frozen=True)
class Section:
    """What may stand in one table: the chains of one protocol in one track, on the same data and with the same steps.

    Attributes:
        name: folder of the protocol in the results: its label, and a mark for a second data set or class order of the same name.
        title: the protocol in words.
        data_set, data_title, data: name, words and fingerprint of the data.
        setting, track: as asked for.
        groups: class ids per step, without background.
        chains: the rows.
        overrides: settings of --set that every row has, "key=value,…"; then no row's title repeats them.
    """

    name: str
    title: str
    data_set: str
    data_title: str
    data: str
    setting: str
    track: str
    groups: tuple[tuple[int, ...], ...]
    chains: tuple[Chain, ...]
    overrides: str = ""

    @property
    def n_first(self) -> int:
        """Channels of step 0, background included."""
        return 1 + len(self.groups[0])

    @property
    def n_classes(self) -> int:
        """Channels after the last step, background included."""
        return 1 + sum(map(len, self.groups))


def collect(store: Store, protocols: Sequence[str] | None = None) -> list[Section]:
    """Read every finished result.

    Args:
        store: the results folder.
        protocols: labels of those wanted; None: all.

    Raises:
        UserError: nothing finished, a protocol without results, or a damaged file.
    """
    links: dict[tuple[str, str, str], list[tuple[int, int, Path]]] = {}
    for name, track, method, seed, step, folder in store.links():
        links.setdefault((name, track, method), []).append((seed, step, folder))
    if not links:
        raise UserError(
            f"results folder {store.root}: nothing finished to report; run for example: bench run --protocol shapes-6-2 --methods joint,ft,mib "
            "(or name another folder with --results DIR)"
        )
    if protocols is not None:
        names = {name for name, _, _ in links}
        for wanted in protocols:
            if not any(answers(name, wanted) for name in names):
                raise unknown("protocol", wanted, names, where=f"--protocol: no finished result in {store.root}")
        links = {place: found for place, found in links.items() if any(answers(place[0], wanted) for wanted in protocols)}
    order = _order(store)
    sections: dict[tuple[Any, ...], Section] = {}
    for (name, track, method), found in sorted(links.items(), key=lambda item: (order.get(item[0][1:], len(order)), item[0])):
        folder = store.root / name / track / method
        about = read_json(folder / "chain.json")
        if about is None:
            raise UserError(f"{folder / 'chain.json'}: not there; run bench run for {name} and {method} again (it trains nothing that is done)")
        groups = tuple(tuple(group) for group in about["groups"])
        seeds = sorted(int(path.name.removeprefix("seed-")) for path in folder.glob("seed-*"))
        chain = _chain(about, groups, seeds, [_result(*link) for link in found])
        if (name, track, groups) not in sections:
            inputs = (chain.results or chain.stale)[-1].inputs["data"]
            data = read_json(store.root / name / "data.json") or {}
            sections[name, track, groups] = Section(
                name, about["protocol_title"], about["data_set"], data.get("data_set", about["data_set"]),
                f"{inputs['train']}-{inputs['test']}", about["setting"], track, groups, (),
            )  # fmt: skip
        section = sections[name, track, groups]
        sections[name, track, groups] = replace(section, chains=(*section.chains, chain))
    return sorted(_titled(list(sections.values())), key=lambda s: (s.data_set, _natural(s.name), [*TRACKS, s.track].index(s.track)))


def answers(name: str, wanted: str) -> bool:
    """Whether a protocol's folder answers to a label: it may carry the mark of a second data set."""
    return wanted in (name, name.partition("~")[0])


def _natural(name: str) -> list[Any]:
    """A sort key under which voc-2-1 comes before voc-10-1."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _order(store: Store) -> dict[tuple[str, str], int]:
    """Position of each (track, method) in the order in which runs asked for them: the order of the rows."""
    order: dict[tuple[str, str], int] = {}
    for run in store.runs():
        for chain in run["chains"]:
            _, track, *method = chain["places"][0].split("/")[:-2]
            order.setdefault((track, "/".join(method)), len(order))
    return order


def _result(seed: int, step: int, folder: Path) -> Result:
    job, metrics = read_json(folder / "job.json"), read_json(folder / "metrics.json")
    if job is None:
        raise UserError(f"{folder / 'job.json'}: not there; delete {folder.resolve()} and run the same command again")
    if not isinstance(metrics, dict) or not {"key", "scores"} <= set(metrics) or "inputs" not in job:
        raise UserError(f"{folder.resolve()}: damaged; delete this folder and run the same command again")
    return Result(seed, step, metrics["key"], folder, job, metrics)


def _chain(about: Mapping[str, Any], groups: tuple[tuple[int, ...], ...], seeds: list[int], results: list[Result]) -> Chain:
    at_once = about["steps"] == 1 and len(groups) > 1
    classes = [[c for group in groups for c in group]] if at_once else [list(group) for group in groups]
    kept: list[Result] = []
    stale: list[Result] = []
    for seed in seeds:
        mine = sorted((result for result in results if result.seed == seed), key=lambda result: result.step)
        n = next((i for i in range(len(mine)) if not _follows(mine[: i + 1], classes)), len(mine))
        kept += mine[:n]
        stale += mine[n:]
    return Chain(about["method"], about["title"], about["steps"], at_once, tuple(about["footnotes"]), tuple(seeds), tuple(kept), tuple(stale))


def _follows(chain: list[Result], classes: list[list[int]]) -> bool:
    """Whether the last result learned the protocol's classes and, where the step before it is there, builds on that."""
    *before, last = chain
    builds = not before or before[-1].step != last.step - 1 or last.inputs["parent"] == before[-1].key
    return builds and last.step < len(classes) and last.inputs["classes"] == classes[: last.step + 1]


def _titled(sections: list[Section]) -> list[Section]:
    """Sections in which a title stands for one method everywhere: with its overrides, unless all rows have the same, and its label if needed."""
    overrides = {chain.label: chain.label.partition("[")[2].removesuffix("]") for section in sections for chain in section.chains}
    common = next(iter(overrides.values())) if len(set(overrides.values())) == 1 else ""
    titles = {c.label: c.title if common or not overrides[c.label] else f"{c.title} [{overrides[c.label]}]" for s in sections for c in s.chains}
    count = Counter(titles.values())
    titles = {label: f"{title} ({label})" if count[title] > 1 else title for label, title in titles.items()}
    return [replace(s, chains=tuple(replace(c, title=titles[c.label]) for c in s.chains), overrides=common) for s in sections]


# ---- numbers -------------------------------------------------------------------------------------------------------------


def numbers(sections: Iterable[Section]) -> pd.DataFrame:
    """Every measured number, one a row, with the columns COLUMNS: all conventions, steps and seeds.

    Quantities are "old", "new" and "all" after each step, "iou" of each class, and "avg" (in the row of the last step) where every step is
    there. What a convention leaves out has no row. Old and new follow the protocol's steps for every method, also one that learns all
    classes at once.
    """
    rows: list[tuple[Any, ...]] = []
    for section in sections:
        about = (section.name, section.data_set, section.setting, section.data, section.track)
        for chain in section.chains:
            for seed, results in chain.by_seed.items():
                for name in CONVENTIONS:
                    everywhere = []
                    for result in results:
                        where = (result.network, chain.label, chain.title, result.memory, seed, result.step, chain.steps, name)
                        iou = _iou(result, name)
                        means = old_new_all(iou, section.n_first, CONVENTIONS[name])
                        everywhere.append(means["all"])
                        for quantity, value in means.items():
                            rows.append((*about, *where, quantity, None, None, 100 * value, result.key))
                        for channel, value in enumerate(iou):
                            rows.append((*about, *where, "iou", channel, result.metrics["classes"][channel], 100 * value, result.key))
                    if len(results) == chain.steps > 1:
                        keys = " ".join(result.key for result in results)
                        rows.append((*about, *where, "avg", None, None, 100 * float(np.mean(everywhere)), keys))
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).dropna(subset="value")
    return frame.astype({"channel": "Int64"})


def _iou(result: Result, convention: str) -> np.ndarray:
    """IoU of each class, NaN where the convention leaves it out."""
    try:
        values = result.metrics["scores"][convention]["iou"]
    except KeyError:
        raise UserError(
            f"{result.folder / 'metrics.json'}: scores.{convention}: not there; delete {result.folder.resolve()} and run the same command again"
        ) from None
    return np.array([np.nan if value is None else value for value in values], np.float64)
