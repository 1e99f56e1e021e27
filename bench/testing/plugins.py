"""A method, offered under a name as an installed package would, for as long as a test lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.method.interface import Method
from bench.method.recipe import read_recipe
from bench.method.registry import METHODS, Found, method
from bench.models.build import BODIES, CLASSIFIERS, NETWORKS
from bench.names import Registry

REGISTRIES: tuple[Registry[Any], ...] = (METHODS, BODIES, CLASSIFIERS, NETWORKS)


class Offers:
    """Methods that a test adds.

    Args:
        folder: where their recipes are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, cls: type[Method], recipe: str = "") -> None:
        """Offer a class under a name, with the text of its recipe file; again: in place of the one before."""
        path = self.folder / f"{name.replace('-', '_')}.toml"
        path.write_text(recipe, encoding="utf-8")
        METHODS._added.pop(name, None)
        METHODS.add(name, Found(cls, read_recipe(path)), f"a test: {path}")
        method.cache_clear()


@contextlib.contextmanager
def offering(folder: Path) -> Iterator[Offers]:
    """Offers, which are gone at the end; so is what the test added to the networks and their parts."""
    METHODS.everything()  # what the methods' own files add to the networks is there now, and stays
    before = [dict(registry._added) for registry in REGISTRIES]
    try:
        yield Offers(folder)
    finally:
        for registry, added in zip(REGISTRIES, before, strict=True):
            registry._added.clear()
            registry._added.update(added)
            registry.forget()
        method.cache_clear()
