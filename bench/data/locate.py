"""Where the files of a data set lie on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.data.dataset import Dataset, Split
from bench.errors import UserError

DATA_ROOT_VARIABLE = "CISS_BENCH_DATA"
SPLITS = ("train", "test")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png")


@dataclass(frozen=True)
class Files:
    """The files of one split of a data set on this machine.

    Attributes:
        dataset: which one.
        split: "train" or "test".
        root: the folder that the path patterns start from.
        names: of the images, in list order.
    """

    dataset: Dataset
    split: str
    root: Path
    names: tuple[str, ...]

    def _path(self, pattern: str, name: str) -> Path:
        return self.root / pattern.replace("{name}", name)

    @property
    def _patterns(self) -> Split:
        return self.dataset.train if self.split == "train" else self.dataset.test

    def image(self, name: str) -> Path:
        return self._path(self._patterns.image, name)

    def mask(self, name: str) -> Path:
        return self._path(self._patterns.mask, name)

    def map(self, kind: str, name: str) -> Path:
        """The path of a named map beside an image.

        Raises:
            UserError: this data set, or this split of it, has no such maps.
        """
        files = self.dataset.maps.get(kind)
        if files is None or not (files.train or files.test):
            raise UserError(f"data set {self.dataset.name!r} has no {kind} maps")
        pattern = files.train if self.split == "train" else files.test
        if not pattern:
            raise UserError(f"data set {self.dataset.name!r} has no {kind} maps of its {self.split} images")
        return self._path(pattern, name)


def locate(dataset: Dataset, data_root: str | Path | None = None) -> dict[str, Files]:
    """Find the files of a data set.

    Args:
        dataset: which one.
        data_root: where the user says it is; else the variable CISS_BENCH_DATA, or the folder of the data
            set's own TOML file, ./data/<name> and ./data are tried. A data set that can be drawn is drawn if
            it is in none of them.

    Returns:
        {"train": Files, "test": Files}.

    Raises:
        UserError: nothing there; names the places looked at.
    """
    given = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    bases = [Path(given)] if given else [Path("data") / dataset.name, Path("data")]
    if not given and dataset.home:
        bases = [Path(dataset.home), *bases]
    if given and not Path(given).is_dir():
        raise UserError(f"{'--data-root' if data_root else DATA_ROOT_VARIABLE} {given}: no such folder")
    looked = []
    for base in bases:
        for sub in dataset.roots:
            root = base / sub
            looked.append(root)
            found = {split: _names(dataset, split, root) for split in SPLITS}
            if all(found.values()):
                return {split: Files(dataset, split, root, tuple(names)) for split, names in found.items()}
    if dataset.generator:
        from bench.data import generators

        root = generators.ensure(dataset)
        return {split: Files(dataset, split, root, tuple(_names(dataset, split, root))) for split in SPLITS}
    wanted = " or ".join(dataset.train.lists) or dataset.train.image.replace("{name}", "*")
    raise UserError(
        f"data set {dataset.name!r}: not found; looked for {wanted} in {', '.join(map(str, looked))}; "
        "say where it is with --data-root DIR"
    )


def _names(dataset: Dataset, split: str, root: Path) -> Sequence[str]:
    """Image names of a split in list order, or sorted if there is no list. Empty if not there."""
    patterns = dataset.train if split == "train" else dataset.test
    for candidate in patterns.lists:
        if (root / candidate).is_file():
            try:
                lines = (root / candidate).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{root / candidate}: cannot read this image list: {error}") from None
            return [_image_name(line.strip()) for line in lines if line.strip()]
    if patterns.lists:
        return []
    before, _, tail = patterns.image.partition("{name}")
    folder, _, head = before.rpartition("/")
    place = root / folder
    if not place.is_dir():
        return []
    found = (path.name for path in place.iterdir())
    end = -len(tail) or None
    return sorted(name[len(head) : end] for name in found if name.startswith(head) and name.endswith(tail))


def _image_name(line: str) -> str:
    """The name in "/JPEGImages/2007_000032.jpg /Masks/2007_000032.png"; a plain one keeps its spaces."""
    first = line.split()[0]
    words = first if "/" in first or _has_suffix(first) else line
    name = words.rpartition("/")[2]
    return name.rpartition(".")[0] if _has_suffix(name) else name


def _has_suffix(name: str) -> bool:
    stem, dot, suffix = name.rpartition(".")
    return bool(stem and dot) and suffix.lower() in IMAGE_SUFFIXES
