"""Protocol files: TOML that says which classes are learned in which order."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue, Strict, field_validator

from bench import shipped
from bench.data.dataset import Dataset, load_dataset
from bench.errors import UserError
from bench.files import Table, checked, read_toml
from bench.names import Entry, Registry
from bench.protocol.images import SETTINGS
from bench.protocol.protocol import Protocol

DEFAULT_SETTING = "overlapped"
Groups = tuple[tuple[int, ...], ...]
Number = Annotated[int, Strict()]


class ProtocolFile(Table):
    """What a protocol's TOML file may say.

    Example:
        >>> ProtocolFile(dataset="voc", first=15, then=1).setting
        'overlapped'
    """

    title: str = ""
    """For people."""
    dataset: str
    """Name of a data set, or the path of its TOML file, relative to this file."""
    setting: str = DEFAULT_SETTING
    """Which images a step sees."""
    first: Number | None = None
    """Number of classes of step 0."""
    then: Number | None = None
    """Number of classes of each later step."""
    order: list[Number] | None = None
    """Class ids in the order of learning; ascending if not given."""
    steps: list[list[Number]] | None = None
    """Class ids of each step, instead of first, then and order."""
    partition_of: str = ""
    """The protocol beside this one (no suffix) whose finer steps decide the images of "partition"."""
    version: Annotated[int, Field(strict=True, ge=1)] = 1
    """Raised when the file is given another meaning."""

    @field_validator("first", "then", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        if not _is_number(value):
            raise ValueError("not a number of classes")
        return value

    @field_validator("order", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise ValueError("not a list of class ids, as in [1, 2, 3]")
        return value

    @field_validator("steps", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        lists = isinstance(value, list) and all(isinstance(group, list) for group in value)
        if not lists or not all(_is_number(c) for group in value for c in group):
            raise ValueError("not a list of lists of class ids, as in [[1, 2, 3], [4]]")
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def load(name: str | Path, setting: str | None = None) -> Protocol:
    """A protocol by its name, or from a TOML file.

    Args:
        name: "voc-15-1", or a path that ends in .toml.
        setting: a name of SETTINGS; the file's own if None.

    Raises:
        UserError: no such protocol, or a file that does not hold (one line naming file, key, value and cure).

    Example:
        >>> load("voc-15-5").groups[1], load("voc-15-5", "disjoint").label
        ((16, 17, 18, 19, 20), 'voc-15-5-disjoint')
    """
    if str(name).endswith(".toml"):
        return read(Path(name), setting)
    found = PROTOCOLS.find(str(name))
    return found if setting is None else replace(found, setting=_known(setting))


def read(path: Path, setting: str | None = None) -> Protocol:
    """A protocol from its TOML file.

    Example:
        >>> read(shipped.folder("protocols") / "voc-15-1.toml").order[:4]
        (0, 1, 2, 3)
    """
    if not path.is_file():
        raise UserError(f"{path}: no such protocol file")
    return expand(read_toml(path, ProtocolFile), path, setting)


def parse(content: Mapping[str, JsonValue], path: Path, setting: str | None = None) -> Protocol:
    """A protocol from the content of its file; `path` names it in errors and finds its neighbours.

    Example:
        >>> parse({"dataset": "voc", "order": [3, 1, 2], "first": 2, "then": 1}, Path("mine.toml")).groups
        ((3, 1), (2,))
    """
    return expand(checked(content, ProtocolFile, str(path)), path, setting)


def expand(told: ProtocolFile, path: Path, setting: str | None = None) -> Protocol:
    """A protocol from what its file says.

    Example:
        >>> expand(ProtocolFile(dataset="voc", steps=[[2, 1], [3]]), Path("mine.toml")).order
        (0, 2, 1, 3)
    """
    dataset = load_dataset(told.dataset, beside=path)
    chosen = _known(setting) if setting else _known(told.setting, f"{path}: setting")
    groups = _groups(told, dataset, path)
    finer = _finer(told.partition_of, groups, dataset, path) if told.partition_of else ()
    return Protocol(path.stem, dataset, chosen, groups, told.title, finer, told.version)


def _known(setting: str, where: str = "--setting") -> str:
    SETTINGS.find(setting, where)
    return setting


def _finer(name: str, groups: Groups, dataset: Dataset, path: Path) -> Groups:
    """The steps of another protocol, each of which lies within one step here."""
    beside = path.parent / f"{name}.toml"
    if not beside.is_file():
        raise UserError(f"{path}: partition_of: {beside}: no such protocol file")
    finer = _groups(read_toml(beside, ProtocolFile), dataset, beside)
    if any(not any(set(group) <= set(coarse) for coarse in groups) for group in finer):
        raise UserError(f"{path}: partition_of: the steps of {name!r} do not refine the steps here")
    return finer


def _groups(told: ProtocolFile, dataset: Dataset, path: Path) -> Groups:
    """Class ids per step from `steps`, or from `first`, `then` and `order`."""
    last = len(dataset.classes) - 1
    if told.steps is None:
        steps = _cut(told, last, path)
    else:
        for key in ("first", "then", "order"):
            if getattr(told, key) is not None:
                raise UserError(f"{path}: {key}: give either steps, or first and then (with order), not both")
        steps = told.steps
    if not steps:
        raise UserError(f"{path}: steps: empty; a protocol has at least one step")
    where: dict[int, int] = {}
    for t, group in enumerate(steps):
        if not group:
            raise UserError(f"{path}: steps: step {t} is empty; each step learns at least one class")
        for c in group:
            if not 1 <= c <= last:
                raise UserError(
                    f"{path}: steps: step {t}: class {c!r} is out of range; "
                    f"allowed: 1 to {last} of data set {dataset.name!r} (background 0 is always there)"
                )
            if c in where:
                named = f"class {c} ({dataset.classes[c]})"
                raise UserError(
                    f"{path}: steps: {named} is in step {where[c]} and in step {t}; once is allowed"
                )
            where[c] = t
    return tuple(tuple(group) for group in steps)


def _cut(told: ProtocolFile, last: int, path: Path) -> list[list[int]]:
    """The order cut into the first step and equal later ones."""
    order = list(range(1, last + 1)) if told.order is None else told.order
    allowed = f"allowed: 1 to {last} (or give steps = [[…], …])"
    for key, value in (("first", told.first), ("then", told.then)):
        if value is None:
            raise UserError(f"{path}: {key}: missing; {allowed}")
        if value < 1:
            raise UserError(f"{path}: {key}: {value} is not a number of classes; {allowed}")
    assert told.first is not None
    assert told.then is not None
    first, then = told.first, told.then
    left = len(order) - first
    if left < 0:
        raise UserError(f"{path}: first: {first} classes, but the order has only {len(order)}")
    if left % then:
        raise UserError(
            f"{path}: then: {left} classes are left after the first {first}; {then} does not divide them"
        )
    return [order[:first], *(order[i : i + then] for i in range(first, len(order), then))]


# ---- by name -----------------------------------------------------------------------------------------------


def _shipped() -> dict[str, Entry[Protocol]]:
    paths = shipped.folder("protocols").glob("*.toml")
    return {path.stem: Entry(functools.partial(read, path), str(path)) for path in paths}


def _of_entry_point(point: importlib.metadata.EntryPoint) -> Protocol:
    """A package names the path of a TOML file, or a `Protocol`; the entry point's name is the protocol's."""
    found = point.load()
    if isinstance(found, str | Path):
        found = read(Path(found))
    if not isinstance(found, Protocol):
        what = f"{type(found).__name__} is neither a path nor a Protocol"
        raise UserError(f"protocol {point.name!r} ({point.value}): {what}")
    return replace(found, name=point.name)


PROTOCOLS: Registry[Protocol] = Registry("protocol", "bench.protocols")
PROTOCOLS.finders.append(_shipped)
PROTOCOLS.of_entry_point = _of_entry_point
