"""Data sets: class names, and where the files of each split lie. A data set is a TOML file, read here.

A data set needs neither torch nor numpy to be named, located and planned with.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from bench.errors import UserError
from bench.files import Table, read_toml
from bench.names import Entry, Registry

SETS = Path(__file__).resolve().parent / "sets"
IGNORE = 255
"""The label that no loss and no metric counts."""
MAX_CLASSES = 255
"""Ids 0 to 254: one byte a pixel, and 255 says void."""
KIND = re.compile(r"[a-z][a-z0-9_-]*")
SAMPLE_KEYS = ("images", "labels", "classes", "index", "replayed", "error")
"""What a sample holds beside its named maps: a map cannot be called so."""


def _pattern(pattern: str) -> str:
    """Check a path pattern: `{name}` stands in it, and nothing else in braces."""
    braces = re.findall(r"\{[^{}]*\}?|\}", pattern)
    wrong = next((part for part in braces if part != "{name}"), None)
    if wrong is not None:
        raise ValueError(
            f"{wrong} is not allowed in a path pattern; allowed in braces: {{name}}, the image's name"
        )
    if "\0" in pattern:
        raise ValueError("no file's name holds a NUL")
    if not braces:
        raise ValueError("{name} is missing; it stands for the image's name in a path pattern")
    return pattern


def _list(value: Any, of: type, words: str) -> Any:
    """Refuse what is not a list of such values, in words."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"not a list of {words}")
    for part in value:
        if not isinstance(part, of) or isinstance(part, bool):
            raise ValueError(f"{part!r} in a list of {words}")
    return value


class Split(Table):
    """Path patterns of one split, relative to the data root; `{name}` is the image's name."""

    image: str
    """Of an image, for example "JPEGImages/{name}.jpg"."""
    mask: str
    """Of its mask: one byte a pixel."""
    lists: tuple[str, ...] = ()
    """Files that list the images, one a line; the first that exists counts. None: every image there is."""

    _patterns = field_validator("image", "mask")(_pattern)

    @field_validator("lists", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return _list(value, str, "file names in quotes")

    @model_validator(mode="after")
    def _found_by_name(self) -> Split:
        if not self.lists and self.image.count("{name}") > 1:
            raise ValueError(
                f"image = {self.image!r}: {{name}} more than once needs lists that name the images"
            )
        return self


class MapFiles(Table):
    """A named map beside each image, of the same size, one byte a pixel."""

    padding: Annotated[int, Field(strict=True, ge=0, le=255)] = 0
    """What an image that is padded has in the border of this map."""
    train: str = ""
    """Path pattern on the training split; "" if the map does not exist there."""
    test: str = ""
    """The same on the test split."""

    @field_validator("train", "test")
    @classmethod
    def _patterns(cls, pattern: str) -> str:
        return _pattern(pattern) if pattern else pattern


class DatasetFile(Table):
    """What a data set's TOML file may say."""

    title: str = ""
    """For people."""
    classes: tuple[str, ...]
    """Names by id; id 0 is background."""
    background: Literal["class", "unlabelled"] = "class"
    """Whether 0 is a class of its own (VOC), or only says "none of the classes" (ADE20K)."""
    track: str = "small"
    """The track used when none is asked for."""
    roots: tuple[str, ...] = (".",)
    """Folders, relative to the data root that a user gives, in which the files may lie."""
    train: Split
    """The files of the training split."""
    test: Split
    """The files of the test split."""
    mask_ids: tuple[int, ...] = ()
    """Class id of each value that a mask file holds; empty if the file holds class ids."""
    generator: str = ""
    """Name of the generator that makes the files, for a data set that is drawn rather than photographed."""
    maps: dict[str, MapFiles] = {}
    """Named maps beside an image, for example "saliency"."""

    @model_validator(mode="before")
    @classmethod
    def _class_names(cls, content: Any) -> Any:
        """Here and not by field: an error would show all of a long list."""
        names = content.get("classes") if isinstance(content, Mapping) else None
        if names is None:
            return content
        if not isinstance(names, list | tuple):
            raise ValueError(f"classes: {names!r} is not a list of names")
        for name in names:
            if not isinstance(name, str) or not name:
                raise ValueError(f"classes: {name!r} is not a name in quotes")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            places = " and ".join(str(c) for c, name in enumerate(names) if name == twice)
            raise ValueError(f"classes: {twice!r} stands for ids {places}; each class has a name of its own")
        if not 2 <= len(names) <= MAX_CLASSES:
            raise ValueError(
                f"classes: {len(names)} names; allowed: background and 1 to {MAX_CLASSES - 1} others"
            )
        if "background" in names[1:]:
            where = names.index("background")
            raise ValueError(
                f"classes: 'background' stands for id {where}; background is id 0 and comes first"
            )
        return content

    @field_validator("train", "test", mode="before")
    @classmethod
    def _tables(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping | Split):
            raise ValueError(f"not a table; write [{info.field_name}] with image and mask")
        return value

    @field_validator("roots", mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        if not _list(value, str, "folder names in quotes"):
            raise ValueError('empty; ["."] is the data root itself')
        return value

    @field_validator("mask_ids", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        return _list(value, int, "class ids")

    @field_validator("maps", mode="before")
    @classmethod
    def _kinds(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("not a table; write [maps.saliency] with train and test")
        for kind in value:
            if not KIND.fullmatch(kind) or kind in SAMPLE_KEYS:
                taken = f", but not {', '.join(SAMPLE_KEYS)}"
                raise ValueError(f"{kind!r} cannot be a map's name; allowed: a-z, 0-9, - and _{taken}")
        return value

    @model_validator(mode="after")
    def _mask_values(self) -> DatasetFile:
        last = len(self.classes) - 1
        wrong = next((c for c in self.mask_ids if c != IGNORE and not 0 <= c <= last), None)
        if wrong is not None:
            raise ValueError(f"mask_ids: {wrong} is no class id; allowed: 0 to {last}, and {IGNORE} for void")
        if len(self.mask_ids) > 256:
            raise ValueError(
                f"mask_ids: {len(self.mask_ids)} ids; a mask has one byte a pixel, so 256 at most"
            )
        return self


class Dataset(DatasetFile):
    """What the harness knows of a data set before any file is opened."""

    name: str
    """As protocols write it."""
    home: str = ""
    """Folder of the TOML file of a user's own data set, where its files may lie; "" for a shipped one."""

    def __hash__(self) -> int:
        return hash((self.name, self.classes, self.train, self.test, self.mask_ids))

    def raw_to_id(self) -> dict[int, int]:
        """Class id (or 255) of every value that may stand in a mask file."""
        if self.mask_ids:
            return dict(enumerate(self.mask_ids))
        return {**{c: c for c in range(len(self.classes))}, IGNORE: IGNORE}

    @property
    def meaning(self) -> str:
        """A digest of what turns a mask's values into classes, 16 hex digits."""
        said = [self.classes, self.background, sorted(self.raw_to_id().items())]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def read_dataset(path: Path, name: str = "", own: bool = True) -> Dataset:
    """A data set from its TOML file.

    Args:
        path: the file.
        name: of the data set; the file's, without suffix, if "".
        own: its files may lie beside the TOML file.

    Raises:
        UserError: one line that names file, key, value and what is allowed.
    """
    told = read_toml(path, DatasetFile)
    said = {key: getattr(told, key) for key in DatasetFile.model_fields}
    said["title"] = told.title or path.stem
    return Dataset(**said, name=name or path.stem, home=str(path.resolve().parent) if own else "")


def _shipped() -> dict[str, Entry[Dataset]]:
    return {
        path.stem: Entry(functools.partial(read_dataset, path, own=False), str(path))
        for path in SETS.glob("*.toml")
    }


def _of_entry_point(point: importlib.metadata.EntryPoint) -> Dataset:
    """A package names the path of a TOML file, or a `Dataset`."""
    found = point.load()
    if isinstance(found, Dataset):
        return found.model_copy(update={"name": point.name})
    if isinstance(found, str | Path):
        return read_dataset(Path(found), point.name)
    raise UserError(
        f"data set {point.name!r} ({point.value}): {type(found).__name__} is neither a path nor a Dataset"
    )


DATASETS: Registry[Dataset] = Registry("data set", "bench.datasets")
DATASETS.finders.append(_shipped)
DATASETS.of_entry_point = _of_entry_point


def load_dataset(name: str, beside: Path | None = None) -> Dataset:
    """A data set by name, or from a TOML file (relative to `beside`, the protocol file)."""
    where = f"{beside}: dataset" if beside else ""
    if not name.endswith(".toml"):
        return DATASETS.find(name, where)
    path = (beside.parent if beside else Path()) / name
    if not path.is_file():
        raise UserError(f"{where + ': ' if where else ''}{path}: no such file")
    return read_dataset(path)
