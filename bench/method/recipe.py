"""Recipe files: the hyper-parameters of a method, per track, data set and protocol. Each table and key is
known or refused.

    [method]             [published]             [small]          (all methods: bench/method/tracks.toml)
    [method.ade]         [published.voc]         [small.shapes]
    [method.voc-15-1]    [published.voc-10-1]

In a track's tables three words are no settings: `ran = [...]` lists the protocols (with wildcards) on which
the authors ran these values, `note = "..."` is a footnote, and `setting = "partition"` in a data set's table
is the setting in which the authors trained there.

[method] holds what belongs to the method itself and is the same in every track; the others are tracks. `like
= "mib"` in a track's table takes over the training settings of that method's recipe first. [variant.NAME]
holds what `method@NAME` changes, and may hold tables of a data set, a protocol or a track. A method that
wraps others puts what holds around one of them alone into [on.METHOD.method] and [on.METHOD.TRACK].
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.data.dataset import DATASETS
from bench.errors import UserError, unknown
from bench.files import load_toml
from bench.method.settings import TRAINING
from bench.names import Entry, Registry
from bench.protocol.file import PROTOCOLS
from bench.protocol.protocol import Protocol

PUBLISHED = "published"

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """Values from one place.

    Attributes:
        source: the place, in words.
        values: by setting.
    """

    source: str
    values: Values


@dataclass(frozen=True)
class Scoped:
    """A table of a recipe: values for everything, and tables of values for one data set or protocol.

    Attributes:
        place: file and table, in words.
        values: by setting.
        scopes: values by data set or protocol.
        like: the method whose training settings come first; "" for none.
        ran: protocols (with wildcards) on which the authors ran these values; None: not said.
        notes: what a fair comparison must not hide, by data set or protocol ("" for everything).
        settings: the setting in which the authors ran a data set or protocol, where it is not the usual one.
    """

    place: str
    values: Values
    scopes: Mapping[str, Values]
    like: str = ""
    ran: tuple[str, ...] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    def layers(self, protocol: Protocol) -> list[Layer]:
        """From the general to the particular: the table itself, the data set's, the protocol's."""
        found = [Layer(self.place, self.values)]
        for what, name in (("data set", protocol.dataset.name), ("protocol", protocol.name)):
            if name in self.scopes and (what == "data set" or name != protocol.dataset.name):
                found.append(Layer(f"{self.place}, {what} {name}", self.scopes[name]))
        return found

    def training_only(self) -> Scoped:
        """Without the method's own hyper-parameters."""

        def kept(values: Values) -> Values:
            return {key: value for key, value in values.items() if key in TRAINING}

        scopes = {name: kept(v) for name, v in self.scopes.items()}
        return replace(self, values=kept(self.values), scopes=scopes, like="")

    def about(self, told: Mapping[str, str], protocol: Protocol) -> list[str]:
        """Words of `notes` or `settings` that hold for a protocol, from the general to the particular."""
        return [told[name] for name in ("", protocol.dataset.name, protocol.name) if name in told]

    def every(self) -> Iterator[tuple[str, str]]:
        """(place, setting) of everything that it sets."""
        yield from ((self.place, key) for key in self.values)
        for name, values in self.scopes.items():
            yield from ((f"{self.place}, {name}", key) for key in values)


@dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Attributes:
        path: of the file.
        tables: "method" and the tracks.
        variants: tables ("" for the variant's own, else the track) by variant.
        around: tables ("method" or the track) by wrapped method.
    """

    path: Path
    tables: Mapping[str, Scoped]
    variants: Mapping[str, Mapping[str, Scoped]]
    around: Mapping[str, Mapping[str, Scoped]]

    def table(self, name: str) -> Scoped:
        """A table, empty if the file has none of that name."""
        return self.tables.get(name, Scoped(f"{self.path.name} [{name}]", {}, {}))

    def check(self, fields: Iterable[str]) -> None:
        """Raise UserError for a setting that the method does not have. What it sets around others is checked
        with them."""
        known = set(fields)
        for scoped in (
            *self.tables.values(),
            *(s for tables in self.variants.values() for s in tables.values()),
        ):
            for place, key in scoped.every():
                if key not in known:
                    raise unknown("setting", key, known, where=f"{self.path.parent / place}")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UserError: a table that nothing reads; one line with the nearest name.
    """
    return _read(path, path.stat().st_mtime_ns if path.is_file() else 0)


@functools.cache
def _read(path: Path, written: int) -> Recipe:
    content = load_toml(path)
    tracks = TRACKS.known()
    tables: dict[str, Scoped] = {}
    variants: dict[str, Mapping[str, Scoped]] = {}
    around: dict[str, Mapping[str, Scoped]] = {}
    for name, table in content.items():
        if not isinstance(table, dict):
            raise UserError(
                f"{path}: {name} = {table!r}: a value outside of a table; write it under [method]"
            )
        if name == "variant":
            for variant, inner in _tables(table, f"{path}: [variant]"):
                own = {key: value for key, value in inner.items() if key not in tracks}
                variants[variant] = {"": _scoped(own, path, f"variant.{variant}")} | {
                    track: _scoped(inner[track], path, f"variant.{variant}.{track}")
                    for track in tracks
                    if track in inner
                }
        elif name == "on":
            for wrapped, inner in _tables(table, f"{path}: [on]"):
                for key in inner:
                    if key not in ("method", *tracks):
                        raise unknown("table", key, ("method", *tracks), where=f"{path}: [on.{wrapped}]")
                around[wrapped] = {
                    kind: _scoped(values, path, f"on.{wrapped}.{kind}")
                    for kind, values in _tables(inner, f"{path}: [on]")
                }
        elif name == "method" or name in tracks:
            tables[name] = _scoped(table, path, name)
        else:
            raise unknown("table", name, ("method", "variant", "on", *tracks), where=str(path))
    return Recipe(path, tables, variants, around)


def _tables(content: Mapping[str, object], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, table in content.items():
        if not isinstance(table, dict):
            raise UserError(f"{where}: {name} = {table!r}: not a table")
        yield name, table


def _scoped(table: Any, path: Path, name: str) -> Scoped:
    """A table whose inner tables are named after data sets or protocols."""
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name} = {table!r}: not a table")
    place = f"{path.name} [{name}]"
    scopes: dict[str, Values] = {}
    for key, value in table.items():
        if not isinstance(value, dict):
            continue
        _check_scope(key, f"{path}: [{name}]", TRACKS.known() if name.startswith("variant.") else ())
        deeper = next((k for k, v in value.items() if isinstance(v, dict)), None)
        if deeper is not None:
            raise UserError(
                f"{path}: [{name}.{key}.{deeper}]: a table too deep; a table of a data set or protocol holds "
                "values"
            )
        scopes[key] = value
    said = {"": {key: value for key, value in table.items() if not isinstance(value, dict)}, **scopes}
    for scope, values in said.items():
        for key, what in (("like", "the name of a method"), ("note", "text"), ("setting", "a setting")):
            if not isinstance(values.get(key, ""), str):
                at = f"{name}.{scope}" if scope else name
                raise UserError(f"{path}: {at}.{key} = {values[key]!r}: not {what}")
    ran = table.get("ran")
    if ran is not None and not (isinstance(ran, list) and all(isinstance(word, str) for word in ran)):
        raise UserError(f"{path}: {name}.ran = {ran!r}: not a list of protocols")
    return Scoped(
        place,
        {key: value for key, value in said[""].items() if key not in ("like", "ran", "note")},
        {
            scope: {k: v for k, v in values.items() if k not in ("note", "setting")}
            for scope, values in scopes.items()
        },
        str(table.get("like", "")),
        None if ran is None else tuple(ran),
        {scope: str(values["note"]) for scope, values in said.items() if "note" in values},
        {scope: str(values["setting"]) for scope, values in scopes.items() if "setting" in values},
    )


@functools.cache
def _known_scopes() -> frozenset[str]:
    return frozenset((*DATASETS.known(), *PROTOCOLS.known()))


def _check_scope(name: str, where: str, tracks: Iterable[str] = ()) -> None:
    """Refuse a slip of a known data set, or of a protocol of one. Any other name may be somebody's own.

    `tracks` are words that may stand here too.
    """
    head = name.partition("-")[0]
    if head in DATASETS or name in _known_scopes():
        return
    if any(is_slip(name, track) for track in tracks):
        raise unknown("table", name, tracks, where=where)
    if any(is_slip(head, dataset) for dataset in DATASETS.known()):
        raise unknown("data set or protocol", name, _known_scopes(), where=where)


def is_slip(word: str, known: str) -> bool:
    """Whether a word is another with one letter more, less, wrong, or two neighbours swapped."""
    if abs(len(word) - len(known)) > 1:
        return False
    short, long = sorted((word, known), key=len)
    if len(short) < len(long):
        return any(long[:i] + long[i + 1 :] == short for i in range(len(long)))
    wrong = [i for i in range(len(word)) if word[i] != known[i]]
    if len(wrong) < 2:
        return True
    first, second = wrong[0], wrong[-1]
    swapped = word[first] == known[second] and word[second] == known[first]
    return len(wrong) == 2 and second == first + 1 and swapped


# ---- tracks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """How fair a comparison is.

    Attributes:
        name, says: for people.
        table: the values that every method has; empty for "published", whose values stand in each method's
            recipe.
    """

    name: str
    says: str
    table: Scoped


TRACKS: Registry[Track] = Registry("track")
_FILE = Path(__file__).resolve().parent / "tracks.toml"


def _same(track: Track) -> Track:
    return track


def _shipped_tracks() -> dict[str, Entry[Track]]:
    found = {}
    for name, table in _tables(load_toml(_FILE), str(_FILE)):
        values = {key: value for key, value in table.items() if key != "says"}
        found[name] = Track(name, str(table["says"]), _scoped(values, _FILE, name))
    return {name: Entry(functools.partial(_same, track), str(_FILE)) for name, track in found.items()}


TRACKS.finders.append(_shipped_tracks)
