"""Names: one registry for everything that a user, a file or an outside package can name.

Methods, protocols, data sets, networks, classifiers, label rules, augmentations, conventions, tracks,
settings and profiles are all found the same way: entries come from code (`add`), from files (`finder`), and
from installed packages (entry points of the registry's group). An entry is loaded when it is asked for, so a
broken plug-in is a warning in a list and an error only for who asks for it.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from bench.errors import UserError, unknown

T = TypeVar("T")
Loader = Callable[[], T]


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A name's entry: how to get the thing, and where it comes from, in words."""

    load: Callable[[], T]
    origin: str


class Registry(Generic[T]):
    """Things by name.

    Args:
        kind: what it holds, for people: "method", "label rule".
        group: entry-point group of installed packages; "" for none.
        aliases: other words for a name.

    Attributes:
        finders: each gives entries by name, for example one a file of a folder; asked once.
        providers: called before a name counts as unknown: importing a module may add it.
        of_entry_point: turns the object that an entry point names into what the registry holds.
    """

    def __init__(self, kind: str, group: str = "", aliases: Mapping[str, str] | None = None) -> None:
        self.kind, self.group, self.aliases = kind, group, dict(aliases or {})
        self.finders: list[Callable[[], Mapping[str, Entry[T]]]] = []
        self.providers: list[Callable[[], None]] = []
        self.of_entry_point: Callable[[importlib.metadata.EntryPoint], T] = lambda point: point.load()
        self._added: dict[str, Entry[T]] = {}
        self._found: dict[str, list[Entry[T]]] | None = None
        self._loaded: dict[str, T] = {}

    # ---- filling -------------------------------------------------------------------------------------------

    def add(self, name: str, value: T, origin: str = "") -> T:
        """Add a thing under a name. Adding the same thing again changes nothing.

        Raises:
            UserError: the name is taken by another.
        """
        before = self._added.get(name)
        if before is not None and before.load() is not value:
            raise UserError(f"{self.kind} {name!r}: the name is taken by {before.origin or 'a built-in one'}")
        self._added[name] = Entry(lambda: value, origin)
        self._loaded.pop(name, None)
        return value

    def remove(self, name: str) -> None:
        """Take back what was added under a name."""
        self._added.pop(name, None)
        self._loaded.pop(name, None)

    def forget(self) -> None:
        """Look anew at what finders and installed packages offer."""
        self._found = None
        self._loaded.clear()

    def _entries(self) -> dict[str, list[Entry[T]]]:
        if self._found is None:
            self._found = {}
            for finder in self.finders:
                for name, entry in finder().items():
                    self._found.setdefault(name, []).append(entry)
            for point in importlib.metadata.entry_points(group=self.group) if self.group else ():
                entry = Entry(
                    functools.partial(self.of_entry_point, point),
                    f"entry point of {self.group}: {point.value}",
                )
                self._found.setdefault(point.name, []).append(entry)
        entries = {name: list(found) for name, found in self._found.items()}
        for name, entry in self._added.items():
            entries.setdefault(name, []).insert(0, entry)
        return entries

    # ---- asking --------------------------------------------------------------------------------------------

    def known(self) -> list[str]:
        """Every name, sorted. Nothing is loaded."""
        return sorted(self._entries())

    def __contains__(self, name: object) -> bool:
        return self.aliases.get(str(name), name) in self._entries()

    def find(self, name: str, where: str = "") -> T:
        """The thing of that name.

        Args:
            name: or an alias of it.
            where: the file or option that names it, for errors.

        Raises:
            UserError: unknown (with the nearest name), brought by two, or one that cannot be loaded.
        """
        name = self.aliases.get(name, name)
        if name in self._loaded:
            return self._loaded[name]
        entries = self._entries()
        if name not in entries:
            for provider in self.providers:
                provider()
            entries = self._entries()
        if name not in entries:
            raise unknown(self.kind, name, self.known(), where)
        if len(entries[name]) > 1:
            origins = " and ".join(entry.origin or "a built-in one" for entry in entries[name])
            raise UserError(f"{self.kind} {name!r}: two have this name: {origins}; uninstall or rename one")
        self._loaded[name] = self._load(name, entries[name][0])
        return self._loaded[name]

    def _load(self, name: str, entry: Entry[T]) -> T:
        try:
            return entry.load()
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever a plug-in raises when it is imported
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.kind} {name!r} ({entry.origin}): cannot be loaded: {what}") from error

    def everything(self) -> tuple[dict[str, T], list[str]]:
        """(things by name, warnings): all that can be loaded, and one line for each that cannot."""
        found, warnings = {}, []
        for name in self.known():
            try:
                found[name] = self.find(name)
            except UserError as error:
                warnings.append(str(error))
        return found, list(dict.fromkeys(warnings))

    def match(self, words: Iterable[str], where: str = "") -> list[str]:
        """Names, with wildcards expanded (`voc-15-*`), in the order asked for, each once.

        Raises:
            UserError: a pattern that fits nothing.
        """
        names: dict[str, None] = {}
        for word in words:
            if not any(c in word for c in "*?["):
                names[self.aliases.get(word, word)] = None
                continue
            fitting = fnmatch.filter(self.candidates(word), word)
            if not fitting:
                raise unknown(self.kind, word, self.known(), where)
            names.update(dict.fromkeys(fitting))
        return list(names)

    def candidates(self, pattern: str) -> list[str]:
        """The names that a pattern is held against."""
        return self.known()
