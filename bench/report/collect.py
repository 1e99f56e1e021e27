"""What a report is made of: the finished results of a folder, in sections, and as one tidy table of numbers.

Only what belongs together is collected. A link that an earlier version of a recipe or protocol left (its
job does not build on the job that stands one step before it, or learned other classes) is set aside and
named, never averaged. The records say everything: no data set's or protocol's file is opened, so a report
is there even when those are gone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from bench.errors import UserError, unknown
from bench.protocol.protocol import Protocol
from bench.store.changes import Change, change
from bench.store.records import (
    ChainRecord,
    DataRecord,
    Environment,
    Inputs,
    JobRecord,
    Metrics,
    Record,
    read_record,
)
from bench.store.results import Link, Store

R = TypeVar("R", bound=Record)
QUANTITIES = ("old", "new", "all", "avg")
LEADING_TRACKS = ("published", "controlled")
"""Sections of these tracks come first; those of all others follow by name."""


@dataclass(frozen=True)
class Result:
    """One finished step.

    Attributes:
        seed, step: of its chain.
        folder: its artifact.
        job, metrics: the artifact's records of that name.
        ran: on what it ran, and with which code; nothing is known if that record is gone.
    """

    seed: int
    step: int
    folder: Path
    job: JobRecord
    metrics: Metrics
    ran: Environment

    @cached_property
    def change(self) -> Change:
        """What has changed since it ran."""
        return change(self.ran)

    @property
    def key(self) -> str:
        """Of its job."""
        return self.metrics.key

    @property
    def inputs(self) -> Inputs:
        """Everything that decided the outcome."""
        return self.job.inputs

    @property
    def network(self) -> str:
        return str(self.inputs.training["network"])

    @property
    def memory(self) -> int:
        """Exemplars kept after this step."""
        return len(self.metrics.memory)


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

    @cached_property
    def behind(self) -> list[Result]:
        """The steps behind the row's numbers: of the seeds that reached the last one, if any did."""
        return [result for final in self.finals for result in self.by_seed[final.seed]] or list(self.results)

    @property
    def device(self) -> str:
        """What it was measured on: "cpu", "cuda", "cpu / cuda"; "" if that is not known."""
        return _listed(result.ran.device_kind for result in self.behind)

    @property
    def torch(self) -> str:
        """Version of torch, or versions; "" if it is not known."""
        return _listed(result.ran.torch for result in self.behind)

    @property
    def driver(self) -> str:
        """Version of the GPU's driver, or versions; "" without one."""
        return _listed(result.ran.driver or "" for result in self.behind)


def _listed(values: Iterable[str]) -> str:
    return " / ".join(sorted({value for value in values if value}))


@dataclass(frozen=True)
class Section:
    """What may stand in one table: chains of one protocol and track, on the same data, with the same steps.

    Attributes:
        name: folder of the protocol in the results: its label, and a mark for a second data set or class
            order of the same name.
        protocol: as the first row's chain was asked for.
        data_title, data: words and fingerprint of the data.
        track: as asked for.
        chains: the rows.
        overrides: settings of --set that every row has, "key=value,…"; then no row's title repeats them.
    """

    name: str
    protocol: Protocol
    data_title: str
    data: str
    track: str
    chains: tuple[Chain, ...]
    overrides: str = ""

    @property
    def title(self) -> str:
        """The protocol in words."""
        return self.protocol.title

    @property
    def setting(self) -> str:
        return self.protocol.setting

    @property
    def data_set(self) -> str:
        """Name of the data set."""
        return self.protocol.dataset.name

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Class ids per step, without background."""
        return self.protocol.groups

    @property
    def n_first(self) -> int:
        """Channels of step 0, background included."""
        return self.protocol.step(0).n_classes

    @property
    def n_classes(self) -> int:
        """Channels after the last step, background included."""
        return len(self.protocol.order)


def collect(store: Store, protocols: Sequence[str] | None = None) -> list[Section]:
    """Read every finished result.

    Args:
        store: the results folder.
        protocols: labels of those wanted; None: all.

    Raises:
        UserError: nothing finished, a protocol without results, or a damaged file.
    """
    places: dict[tuple[str, str, str], list[Link]] = {}
    for link in store.links():
        places.setdefault((link.protocol, link.track, link.method), []).append(link)
    if not places:
        raise UserError(
            f"results folder {store.root}: nothing finished to report; run for example: "
            "bench run --protocol shapes-6-2 --methods joint,ft,mib "
            "(or name another folder with --results DIR)"
        )
    if protocols is not None:
        names = {name for name, _, _ in places}
        for wanted in protocols:
            if not any(answers(name, wanted) for name in names):
                raise unknown(
                    "protocol", wanted, names, where=f"--protocol: no finished result in {store.root}"
                )
        wanted_places = [place for place in places if any(answers(place[0], wanted) for wanted in protocols)]
        places = {place: places[place] for place in wanted_places}
    order = _order(store)
    sections: dict[tuple[str, str, tuple[tuple[int, ...], ...]], Section] = {}
    for place in sorted(places, key=lambda place: (order.get(place[1:], len(order)), place)):
        name, track, method = place
        folder = store.root / name / track / method
        about = read_record(folder / ChainRecord.file, ChainRecord)
        if about is None:
            cure = f"run bench run for {name} and {method} again (it trains nothing that is done)"
            raise UserError(f"{folder / ChainRecord.file}: not there; {cure}")
        seeds = sorted(int(path.name.removeprefix("seed-")) for path in folder.glob("seed-*"))
        chain = _chain(about, seeds, [_result(link) for link in places[place]])
        begun = sections.setdefault(
            (name, track, about.protocol.groups), _section(store, name, track, about, chain)
        )
        sections[name, track, about.protocol.groups] = replace(begun, chains=(*begun.chains, chain))
    titled = _titled(list(sections.values()))
    return sorted(titled, key=lambda s: (s.data_set, _natural(s.name), _track_order(s.track)))


def answers(name: str, wanted: str) -> bool:
    """Whether a protocol's folder answers to a label: it may carry the mark of a second data set."""
    return wanted in (name, name.partition("~")[0])


def _natural(name: str) -> list[int | str]:
    """A sort key under which voc-2-1 comes before voc-10-1."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _track_order(track: str) -> tuple[int, str]:
    """A sort key: the leading tracks, then the others by name."""
    return (LEADING_TRACKS.index(track) if track in LEADING_TRACKS else len(LEADING_TRACKS)), track


def _order(store: Store) -> dict[tuple[str, ...], int]:
    """Position of each (track, method) in the order in which runs asked for them: the order of the rows."""
    order: dict[tuple[str, ...], int] = {}
    for run in store.runs():
        for chain in run.record.chains:
            for place in chain.places[:1]:
                _, track, *method = place.split("/")[:-2]
                order.setdefault((track, "/".join(method)), len(order))
    return order


def _section(store: Store, name: str, track: str, about: ChainRecord, chain: Chain) -> Section:
    """The section that a chain belongs to, without rows."""
    digests = (chain.results or chain.stale)[-1].inputs.data
    known = read_record(store.root / name / DataRecord.file, DataRecord)
    title = known.data_set if known else about.protocol.dataset.title
    return Section(name, about.protocol, title, f"{digests.train}-{digests.test}", track, ())


def _result(link: Link) -> Result:
    """What a link points to."""
    ran = read_record(link.folder.resolve() / Environment.file, Environment) or Environment()
    return Result(link.seed, link.step, link.folder, _record(link, JobRecord), _record(link, Metrics), ran)


def _record(link: Link, kind: type[R]) -> R:
    """A record of an artifact. Errors name the artifact, not the link: that is what must be deleted."""
    artifact = link.folder.resolve()
    record = read_record(artifact / kind.file, kind)
    if record is None:
        cure = f"delete {artifact} and run the same command again"
        raise UserError(f"{link.folder / kind.file}: not there; {cure}")
    return record


def _chain(about: ChainRecord, seeds: list[int], results: list[Result]) -> Chain:
    at_once = about.steps == 1 and len(about.protocol.groups) > 1
    protocol = about.protocol.at_once() if at_once else about.protocol
    classes = [list(group) for group in protocol.groups]
    kept: list[Result] = []
    stale: list[Result] = []
    for seed in seeds:
        mine = sorted((result for result in results if result.seed == seed), key=lambda result: result.step)
        n = next((i for i in range(len(mine)) if not _follows(mine[: i + 1], classes)), len(mine))
        kept += mine[:n]
        stale += mine[n:]
    return Chain(
        about.method,
        about.title,
        about.steps,
        at_once,
        tuple(about.footnotes),
        tuple(seeds),
        tuple(kept),
        tuple(stale),
    )


def _follows(chain: list[Result], classes: list[list[int]]) -> bool:
    """Whether the last result learned the protocol's classes and builds on the step before it, if any."""
    *before, last = chain
    builds = not before or before[-1].step != last.step - 1 or last.inputs.parent == before[-1].key
    return builds and last.step < len(classes) and last.inputs.classes == classes[: last.step + 1]


def _titled(sections: list[Section]) -> list[Section]:
    """Sections in which a title stands for one method everywhere.

    It holds the method's overrides, unless all rows have the same, and its label if needed.
    """
    chains = [chain for section in sections for chain in section.chains]
    overrides = {chain.label: chain.label.partition("[")[2].removesuffix("]") for chain in chains}
    common = next(iter(overrides.values())) if len(set(overrides.values())) == 1 else ""
    titles = {
        chain.label: chain.title
        if common or not overrides[chain.label]
        else f"{chain.title} [{overrides[chain.label]}]"
        for chain in chains
    }
    count = Counter(titles.values())
    titles = {label: f"{title} ({label})" if count[title] > 1 else title for label, title in titles.items()}
    return [
        replace(s, chains=tuple(replace(c, title=titles[c.label]) for c in s.chains), overrides=common)
        for s in sections
    ]
