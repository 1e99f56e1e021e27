"""Data sets: class names, and where the files of each split lie. A data set is a TOML file; this module reads it.

A data set needs neither torch nor numpy to be named, located and planned with.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import UserError, unknown

SETS = Path(__file__).resolve().parent / "sets"
IGNORE = 255
"""The label that no loss and no metric counts."""
DATA_ROOT_VARIABLE = "CISS_BENCH_DATA"


@dataclass(frozen=True)
class Split:
    """Path patterns of one split, relative to the data root; `{name}` is the image's name."""

    image: str
    mask: str
    lists: tuple[str, ...] = ()
    saliency: str = ""


@dataclass(frozen=True)
class Dataset:
    """What the harness knows of a data set before any file is opened.

    Attributes:
        name: as protocols write it.
        title: for people.
        classes: names by id; id 0 is background.
        background: "class" where 0 is a class of its own (VOC), "unlabelled" where 0 only means "none of ours" (ADE20K).
        track: the track used when none is asked for.
        roots: folders, relative to the data root a user gives, in which the files may lie.
        train, test: the splits.
        mask_ids: class id of each value a mask file holds; empty if the file holds class ids.
        generator: name of the generator that makes the files, for a data set that is drawn rather than photographed.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    background: str
    track: str
    roots: tuple[str, ...]
    train: Split
    test: Split
    mask_ids: tuple[int, ...] = ()
    generator: str = ""
    source: Path = field(default=Path(), compare=False, repr=False)

    def raw_to_id(self) -> dict[int, int]:
        """Class id (or 255) of every value that may stand in a mask file."""
        if self.mask_ids:
            return dict(enumerate(self.mask_ids))
        return {**{c: c for c in range(len(self.classes))}, IGNORE: IGNORE}


@dataclass(frozen=True)
class Files:
    """The files of one split of a data set on this machine."""

    dataset: Dataset
    split: str
    root: Path
    names: tuple[str, ...]

    def _path(self, pattern: str, name: str) -> Path:
        return self.root / pattern.format(name=name)

    @property
    def _split(self) -> Split:
        return self.dataset.train if self.split == "train" else self.dataset.test

    def image(self, name: str) -> Path:
        return self._path(self._split.image, name)

    def mask(self, name: str) -> Path:
        return self._path(self._split.mask, name)

    def saliency(self, name: str) -> Path | None:
        """The saliency map's path, or None if this data set has none at all."""
        return self._path(self._split.saliency, name) if self._split.saliency else None


def dataset_names() -> list[str]:
    """The data sets that come with the harness."""
    return sorted(path.stem for path in SETS.glob("*.toml"))


def load_dataset(name: str, beside: Path | None = None) -> Dataset:
    """Read a data set by name, or from a TOML file whose path ends in .toml (relative to `beside`, the protocol file)."""
    if not name.endswith(".toml"):
        if name not in dataset_names():
            raise unknown("data set", name, dataset_names(), where=f"{beside}: dataset" if beside else "")
        return _read(SETS / f"{name}.toml")
    path = (beside.parent if beside else Path()) / name
    if not path.is_file():
        raise UserError(f"{beside}: dataset: {path}: no such file")
    return _read(path)


@functools.cache
def _read(path: Path) -> Dataset:
    allowed = ("title", "classes", "background", "track", "roots", "train", "test", "mask_ids", "generator")
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None
    for key in content:
        if key not in allowed:
            raise unknown("key", key, allowed, where=str(path))
    for key in ("classes", "train", "test"):
        if key not in content:
            raise UserError(f"{path}: {key}: missing; a data set names its classes and the files of train and test")
    background = content.get("background", "class")
    if background not in ("class", "unlabelled"):
        raise unknown("value", background, ("class", "unlabelled"), where=f"{path}: background")
    classes = tuple(content["classes"])
    mask_ids = tuple(content.get("mask_ids", ()))
    if any(i != IGNORE and not 0 <= i < len(classes) for i in mask_ids):
        raise UserError(f"{path}: mask_ids: {list(mask_ids)}; allowed: 0 to {len(classes) - 1}, and 255 for void")
    return Dataset(
        name=path.stem,
        title=content.get("title", path.stem),
        classes=classes,
        background=background,
        track=content.get("track", "small"),
        roots=tuple(content.get("roots", ["."])),
        train=_split(content["train"], path, "train"),
        test=_split(content["test"], path, "test"),
        mask_ids=mask_ids,
        generator=content.get("generator", ""),
        source=path,
    )


def _split(content: dict[str, Any], path: Path, name: str) -> Split:
    for key in content:
        if key not in ("image", "mask", "lists", "saliency"):
            raise unknown("key", key, ("image", "mask", "lists", "saliency"), where=f"{path}: {name}")
    try:
        return Split(content["image"], content["mask"], tuple(content.get("lists", ())), content.get("saliency", ""))
    except KeyError as error:
        raise UserError(f"{path}: {name}.{error.args[0]}: missing") from None


def locate(dataset: Dataset, data_root: str | Path | None = None) -> dict[str, Files]:
    """Find the files of a data set.

    Args:
        dataset: which one.
        data_root: where the user says it is; else the variable CISS_BENCH_DATA, or the folder of the data set's own
            TOML file, ./data/<name> and ./data are tried. A data set that can be drawn is drawn if it is in none of them.

    Returns:
        {"train": Files, "test": Files}.

    Raises:
        UserError: nothing there; names the places looked at.
    """
    given = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    bases = [Path(given)] if given else [Path("data") / dataset.name, Path("data")]
    if not given and dataset.source.parent != SETS:  # a user's own data set: beside its TOML file
        bases = [dataset.source.parent, *bases]
    if given and not Path(given).is_dir():
        raise UserError(f"{'--data-root' if data_root else DATA_ROOT_VARIABLE} {given}: no such folder")
    looked = []
    for base in bases:
        for sub in dataset.roots:
            root = base / sub
            looked.append(root)
            found = {split: _names(dataset, split, root) for split in ("train", "test")}
            if all(found.values()):
                return {split: Files(dataset, split, root, tuple(names)) for split, names in found.items()}
    if dataset.generator:
        from bench.data import generators

        root = generators.ensure(dataset)
        return {split: Files(dataset, split, root, tuple(_names(dataset, split, root))) for split in ("train", "test")}
    wanted = " or ".join(dataset.train.lists) or dataset.train.image.format(name="*")
    raise UserError(
        f"data set {dataset.name!r}: not found; looked for {wanted} in {', '.join(map(str, looked))}; say where it is with --data-root DIR"
    )


def _names(dataset: Dataset, split: str, root: Path) -> Sequence[str]:
    """Image names of a split in list order; without a list file, the sorted names of the images. Empty if not there."""
    patterns = dataset.train if split == "train" else dataset.test
    for candidate in patterns.lists:
        if (root / candidate).is_file():
            try:
                lines = (root / candidate).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{root / candidate}: cannot read this image list: {error}") from None
            return [_image_name(line.split()[0]) for line in lines if line.strip()]
    if patterns.lists:
        return []
    folder, _, tail = patterns.image.partition("{name}")
    return sorted(path.name[: -len(tail)] for path in (root / folder).glob(f"*{tail}")) if (root / folder).is_dir() else []


def _image_name(word: str) -> str:
    """ "/JPEGImages/2007_000032.jpg" as "2007_000032"; a plain name stays as it is."""
    name = word.rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and suffix.lower() in ("jpg", "jpeg", "png") else name
