"""The class index: which classes each image shows. All of planning works from it alone.

A plain text file a split, one line an image in list order: name, tab, `id id …`, without background and void.
It is made once, by reading every mask with all cores, and kept in the cache; nothing is written into the
user's data. Lines that start with # are comments, and carry what the index was made of: the file's format,
what turns mask values into classes, and sizes and times of the files. When one of them is another than now,
the index is made anew. Its fingerprint stands for the content of the files: it goes into the keys of jobs, so
that two data sets with the same classes but other photographs never share a result.

A data set may bring the index itself, as `class-index/<split>.txt` in its root: then no mask is decoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.data.cores import cores
from bench.data.dataset import IGNORE, Dataset
from bench.data.locate import Files, locate
from bench.errors import UserError
from bench.files import cache, write_text
from bench.progress import track

FORMAT = "2"
MARKS = {"format": "# format ", "meaning": "# meaning ", "stamp": "# stamp ", "fingerprint": "# fingerprint "}
OLD_STAMP = "# sizes and times "
"""How the first format called its stamp."""
SAMPLE_BYTES = 4096
TAIL_BYTES = 1024
"""A whole image ends within this many bytes with its format's mark; another is decoded to be sure."""
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
CHUNK = 64
"""Images that a process reads at a time."""


@dataclass(frozen=True)
class ClassIndex:
    """Which classes the images of a split show.

    Attributes:
        names: of the images, in list order.
        presence: a bit mask of the classes of each image.
        fingerprint: of what turns masks into classes, of all masks and, by sample, of all images; 16 hex
            digits.
        stamp: stands for sizes and times of the files when they were read; "" if that is not known.
    """

    names: tuple[str, ...]
    presence: tuple[int, ...]
    fingerprint: str
    stamp: str = ""

    def count(self, c: int) -> int:
        """Number of images that show class `c`."""
        return sum(shows >> c & 1 for shows in self.presence)


def class_indexes(dataset: Dataset, data_root: str | Path | None = None) -> dict[str, ClassIndex]:
    """The class indexes of "train" and "test": as kept if no file has changed, else made from the masks.

    Raises:
        UserError: data not found, an image without its mask, a mask with an unknown id.
    """
    return {split: index_of(files) for split, files in locate(dataset, data_root).items()}


def class_index(dataset: Dataset, data_root: str | Path | None = None, split: str = "train") -> ClassIndex:
    """The class index of one split."""
    return index_of(locate(dataset, data_root)[split])


def index_of(files: Files) -> ClassIndex:
    """The class index of located files."""
    place = _folder(files) / f"{files.split}.txt"
    stamp = _stamp(path for name in files.names for path in (files.image(name), files.mask(name)))
    with contextlib.suppress(UserError):
        kept, marks = _read(place, files.dataset)
        told = (marks.get("format"), marks.get("meaning"), kept.stamp, kept.names)
        if told == (FORMAT, files.dataset.meaning, stamp, files.names) and kept.fingerprint:
            return kept
    index = build(files, stamp=stamp)
    with contextlib.suppress(OSError):  # made again the next time
        place.parent.mkdir(parents=True, exist_ok=True)
        write_class_index(place, index, files)
    return index


def map_fingerprint(dataset: Dataset, data_root: str | Path | None, kind: str) -> str:
    """A digest of the training images' maps of one kind, and of their padding.

    Size and a sample of its bytes stand for a file's content.

    Raises:
        UserError: this data set has no such maps, or some are missing.
    """
    files = locate(dataset, data_root)["train"]
    paths = [files.map(kind, name) for name in files.names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        count = f"{len(missing)} of {len(paths)} {kind} maps are missing"
        raise UserError(f"data set {dataset.name!r}: {count}, the first is {missing[0]}")
    padding = f"padding {dataset.maps[kind].padding}"
    drawn = _drawn(files)
    if drawn:
        return _digest([*drawn, kind, padding])
    place = _folder(files) / f"map-{kind}.txt"
    stamp = _digest([_stamp(paths), padding, *files.names])
    with contextlib.suppress(OSError, UnicodeDecodeError):
        marks = _marks(place.read_text(encoding="utf-8"))
        if (marks.get("format"), marks.get("stamp")) == (FORMAT, stamp) and marks.get("fingerprint"):
            return marks["fingerprint"]
    found = _digest(
        [padding, *(f"{name} {_sample(path)}" for name, path in zip(files.names, paths, strict=True))]
    )
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        title = f"# {kind} maps of data set {dataset.name}, {files.split}"
        write_text(place, "\n".join([title, *_mark_lines(stamp=stamp, fingerprint=found)]) + "\n")
    return found


# ---- what stands for files ---------------------------------------------------------------------------------


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()[:16]


def _stamp(paths: Iterable[Path]) -> str:
    """A digest of the sizes and times of files, without reading them."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            found = path.stat()
            digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
        except OSError:  # building the index names it
            digest.update(b"missing ")
    return digest.hexdigest()[:16]


def _sample(path: Path) -> str:
    """Size of a file and a digest of its first, middle and last 4 KiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= 3 * SAMPLE_BYTES:
            read = file.read()
        else:
            read = b""
            for start in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
                file.seek(start)
                read += file.read(SAMPLE_BYTES)
    return f"{size} {hashlib.sha256(read).hexdigest()[:16]}"


def _drawn(files: Files) -> list[str]:
    """What stands for the content of drawn files; [] for photographs, or if the set lies elsewhere."""
    dataset = files.dataset
    if not dataset.generator:
        return []
    from bench.data import generators

    if files.root != generators.folder(dataset):
        return []
    generator = generators.generator_of(dataset)
    parameters = json.dumps(generator.PARAMETERS, sort_keys=True)
    return [dataset.meaning, dataset.generator, str(generator.VERSION), parameters, files.split]


# ---- the file ----------------------------------------------------------------------------------------------


def _folder(files: Files) -> Path:
    """Where what is known of these files is kept."""
    where = hashlib.sha256(str(files.root.resolve()).encode()).hexdigest()[:8]
    return cache() / "class-index" / f"{files.dataset.name}-{where}"


def _mark_lines(**marks: str) -> list[str]:
    return [MARKS[name] + value for name, value in {"format": FORMAT, **marks}.items()]


def _marks(text: str) -> dict[str, str]:
    """What the comments of a file carry, by name."""
    found = {}
    for line in text.splitlines():
        for name, mark in (*MARKS.items(), ("stamp", OLD_STAMP)):
            if line.startswith(mark):
                found[name] = line.removeprefix(mark).strip()
    return found


def read_class_index(path: Path, dataset: Dataset) -> ClassIndex:
    """Read a class-index file of this or of the first format (`name id id …`); ids must belong to `dataset`.

    Raises:
        UserError: names the file and the line.
    """
    return _read(path, dataset)[0]


def _read(path: Path, dataset: Dataset) -> tuple[ClassIndex, Mapping[str, str]]:
    """A class index, and what the comments of its file carry."""
    names, presence = [], []
    last = len(dataset.classes) - 1
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this class index: {error}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        if line.startswith("#") and "\t" not in line:
            continue
        if "\t" in line:  # the name may hold spaces
            name, _, shown = line.rpartition("\t")
        else:
            name, _, shown = line.strip().partition(" ")
        try:
            ids = [int(c) for c in shown.split()]
        except ValueError:
            raise UserError(f"{path}:{number}: {line!r} is not `name id id …`") from None
        if not name or any(not 1 <= c <= last for c in ids):
            raise UserError(f"{path}:{number}: {line!r}: allowed: a name, then class ids from 1 to {last}")
        names.append(name)
        presence.append(sum(1 << c for c in set(ids)))
    if not names:
        raise UserError(f"{path}: no image in this class index")
    marks = _marks(text)
    fingerprint = marks.get("fingerprint") or _digest([text])
    return ClassIndex(tuple(names), tuple(presence), fingerprint, marks.get("stamp", "")), marks


def write_class_index(path: Path, index: ClassIndex, files: Files) -> None:
    """Write a class-index file; it appears whole or not at all."""
    lines = [
        f"# class index of data set {files.dataset.name}, {files.split}: name, tab, the classes it shows"
    ]
    lines += _mark_lines(meaning=files.dataset.meaning, stamp=index.stamp, fingerprint=index.fingerprint)
    for name, shows in zip(index.names, index.presence, strict=True):
        lines.append(f"{name}\t{' '.join(map(str, class_ids(shows)))}")
    write_text(path, "\n".join(lines) + "\n")


def class_ids(shows: int) -> list[int]:
    """Class ids of a bit mask, ascending."""
    return [c for c in range(1, shows.bit_length()) if shows >> c & 1]


# ---- making it ---------------------------------------------------------------------------------------------


class _Read(NamedTuple):
    """What was read of one image and its mask."""

    shows: int
    content: str


def build(files: Files, workers: int | None = None, stamp: str = "") -> ClassIndex:
    """Read every mask of a split with all cores (`workers` processes) and note which classes it shows.

    Args:
        files: of the split.
        workers: processes; one a core if None.
        stamp: of the files as they are now.
    """
    workers = workers or cores()
    brought = _brought(files, stamp)
    chunks = [slice(i, i + CHUNK) for i in range(0, len(files.names), CHUNK)]
    names = [files.names[chunk] for chunk in chunks]
    shows = [None if brought is None else brought[chunk] for chunk in chunks]
    text = f"class index of {files.dataset.name} ({files.split})"

    def rows() -> Iterable[list[_Read]]:
        if workers == 1 or len(chunks) < 4:
            yield from map(_read_chunk, [files] * len(chunks), names, shows)
        else:
            from concurrent.futures import ProcessPoolExecutor

            with ProcessPoolExecutor(workers) as pool:
                yield from pool.map(_read_chunk, [files] * len(chunks), names, shows)

    found = [row for chunk in track(rows(), total=len(chunks), text=text) for row in chunk]
    content = (f"{name} {row.content}" for name, row in zip(files.names, found, strict=True))
    fingerprint = _digest(_drawn(files) or [files.dataset.meaning, *content])
    return ClassIndex(files.names, tuple(row.shows for row in found), fingerprint, stamp)


def _brought(files: Files, stamp: str) -> tuple[int, ...] | None:
    """The presence that a data set brings in its root; None if it brings none that can be right."""
    try:
        index, marks = _read(files.root / "class-index" / f"{files.split}.txt", files.dataset)
    except UserError:
        return None
    outdated = (
        index.stamp not in ("", stamp) or marks.get("meaning", files.dataset.meaning) != files.dataset.meaning
    )
    return None if outdated or index.names != files.names else index.presence


def _read_chunk(files: Files, names: Sequence[str], shows: Sequence[int] | None) -> list[_Read]:
    """Classes and content of some images; the classes are read from the masks unless `shows` tells them."""
    rows, where = [], f"data set {files.dataset.name!r}, {files.split}"
    for k, name in enumerate(names):
        image, mask = files.image(name), files.mask(name)
        if not image.is_file():
            raise UserError(f"{where}: {image}: listed, but there is no such image")
        if not mask.is_file():
            raise UserError(f"{where}: image {image.name} has no mask; expected {mask}")
        _check_whole(image)
        shown = _shown(mask, files.dataset) if shows is None else shows[k]
        content = hashlib.sha256(mask.read_bytes()).hexdigest()[:16]
        rows.append(_Read(shown, f"{content} {_sample(image)}"))
    return rows


def _shown(mask: Path, dataset: Dataset) -> int:
    """The classes that a mask shows, as a bit mask."""
    from PIL import Image, UnidentifiedImageError

    ids = dataset.raw_to_id()
    try:
        with Image.open(mask) as label:
            mode, histogram = label.mode, label.histogram()
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{mask}: cannot read this mask: {error}") from None
    allowed = f"0 to {max(v for v in ids if v != IGNORE)}" + (", 255 (void)" if IGNORE in ids else "")
    if mode not in ("L", "P"):
        raise UserError(f"{mask}: mode {mode!r} is not one byte a pixel; allowed: {allowed}")
    values = [value for value, count in enumerate(histogram) if count]
    strange = next((value for value in values if value not in ids), None)
    if strange is not None:
        raise UserError(f"{mask}: value {strange} is no class of {dataset.name!r}; allowed: {allowed}")
    return sum(1 << c for c in {ids[value] for value in values} - {0, IGNORE})


def _check_whole(path: Path) -> None:
    """Refuse an image that is cut off or none, mostly without decoding it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                tail = file.read()
            if END_MARKS.get(str(image.format), b"\0no mark") not in tail:
                image.load()
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{path}: cannot decode this image: {error}") from None
