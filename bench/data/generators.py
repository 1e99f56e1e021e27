"""Data sets that are drawn instead of photographed: made in seconds, cached under ./data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bench.data.dataset import Dataset
from bench.errors import UserError, unknown

CACHE = Path("data")


def ensure(dataset: Dataset) -> Path:
    """The folder of a drawn data set, which is drawn first if it is not there; complete or absent, never half."""
    from bench.data import shapes

    generators = {"shapes": shapes}
    if dataset.generator not in generators:
        raise unknown("generator", dataset.generator, generators, where=str(dataset.source))
    generator = generators[dataset.generator]
    root = CACHE / f"{dataset.name}-v{generator.VERSION}"
    if not root.is_dir():
        aside = CACHE / f".{dataset.name}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            generator.draw(aside)
            aside.rename(root)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not root.is_dir():  # else another process was first
                raise UserError(f"data set {dataset.name!r} cannot be drawn into {root}: {error.strerror}") from None
    return root
