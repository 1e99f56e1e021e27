"""Data sets that are drawn instead of photographed: made in seconds, kept in the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from bench.data.dataset import Dataset
from bench.errors import UserError
from bench.files import cache
from bench.names import Entry, Registry


class Generator(Protocol):
    """A module (or an object) that draws a data set."""

    VERSION: int
    """Raised with every change of what is drawn."""
    PARAMETERS: Mapping[str, JsonValue]
    """Everything that decides what is drawn, beside the code."""

    def draw(self, root: Path) -> None:
        """Draw all images, masks, maps and lists into a new folder. The same files every time."""


def _shapes() -> Generator:
    from bench.data import shapes

    return shapes


GENERATORS: Registry[Generator] = Registry("generator", "bench.generators")
GENERATORS.finders.append(lambda: {"shapes": Entry(_shapes, "bench.data.shapes")})


def generator_of(dataset: Dataset) -> Generator:
    """What draws a data set.

    Raises:
        UserError: no such generator.
    """
    return GENERATORS.find(dataset.generator, f"data set {dataset.name!r}: generator")


def folder(dataset: Dataset) -> Path:
    """Where a drawn data set lies, or would lie."""
    return cache() / f"{dataset.generator}-v{generator_of(dataset).VERSION}"


def ensure(dataset: Dataset) -> Path:
    """The folder of a drawn data set, drawn first if it is not there; complete or absent, never half."""
    generator, root = generator_of(dataset), folder(dataset)
    if not root.is_dir():
        aside = root.with_name(f".{root.name}-{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            generator.draw(aside)
            aside.rename(root)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not root.is_dir():  # else another process was first
                raise UserError(
                    f"data set {dataset.name!r} cannot be drawn into {root}: {error.strerror}"
                ) from None
    return root
