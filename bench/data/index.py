"""The class index: which classes each image shows. All of planning works from it alone.

A plain text file per split, one line an image in list order: `name id id …`, without background and void. It is written once,
beside the data set (or, where that cannot be written, under ./data/class-index), by reading every mask with all cores.
Lines that start with # are comments; one of them carries the fingerprint of the files, so that two data sets with the same
classes but other photographs never share a result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from bench.data.dataset import Dataset, Files, locate
from bench.errors import UserError
from bench.progress import track

FINGERPRINT = "# fingerprint "
STAMP = "# sizes and times "
TAIL_BYTES = 1024
"""A whole image ends within this many bytes with its format's end mark; one that does not is decoded to be sure."""
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


@dataclass(frozen=True)
class ClassIndex:
    """Names of a split's images in list order, a bit mask of the classes of each, and the fingerprint of the files.

    `stamp` stands for sizes and times of the files when they were read; "" if that is not known.
    """

    names: tuple[str, ...]
    presence: tuple[int, ...]
    fingerprint: str
    stamp: str = ""

    def count(self, c: int) -> int:
        """Number of images that show class `c`."""
        return sum(shows >> c & 1 for shows in self.presence)


def class_indexes(dataset: Dataset, data_root: str | Path | None = None) -> dict[str, ClassIndex]:
    """The class indexes of "train" and "test": read if they were written before and no file has changed since, else made from the masks.

    Raises:
        UserError: data not found, an image without its mask, a mask with an unknown id.
    """
    return {split: _class_index(files) for split, files in locate(dataset, data_root).items()}


def class_index(dataset: Dataset, data_root: str | Path | None = None, split: str = "train") -> ClassIndex:
    """The class index of one split."""
    return _class_index(locate(dataset, data_root)[split])


def saliency_fingerprint(dataset: Dataset, data_root: str | Path | None = None) -> str:
    """A digest of the training images' saliency maps; the size of each in bytes stands for its content.

    Raises:
        UserError: this data set has no saliency maps, or some are missing.
    """
    files = locate(dataset, data_root)["train"]
    digest, missing = hashlib.sha256(), []
    for name in files.names:
        path = files.saliency(name)
        if path is None:
            raise UserError(f"data set {dataset.name!r} has no saliency maps")
        try:
            digest.update(f"{name} {path.stat().st_size}\n".encode())
        except OSError:
            missing.append(path)
    if missing:
        raise UserError(f"data set {dataset.name!r}: {len(missing)} of {len(files.names)} saliency maps are missing, the first is {missing[0]}")
    return digest.hexdigest()[:16]


def _class_index(files: Files) -> ClassIndex:
    places, stamp = _places(files), _stamp(files)
    for place in places:
        if place.is_file():
            index = read_class_index(place, files.dataset)
            if index.names == files.names and index.stamp == stamp:
                return index
    index = replace(build(files), stamp=stamp)
    for place in places:
        try:
            write_class_index(place, index, files)
            break
        except OSError:
            continue
    return index


def _stamp(files: Files) -> str:
    """A digest of the sizes and times of all images and masks, without reading them."""
    digest = hashlib.sha256()
    for name in files.names:
        for path in (files.image(name), files.mask(name)):
            try:
                found = path.stat()
                digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
            except OSError:  # building the index names it
                digest.update(b"missing ")
    return digest.hexdigest()[:16]


def _places(files: Files) -> list[Path]:
    where = hashlib.sha256(str(files.root.resolve()).encode()).hexdigest()[:8]
    return [
        files.root / "class-index" / f"{files.split}.txt",
        Path("data") / "class-index" / f"{files.dataset.name}-{where}" / f"{files.split}.txt",
    ]


def read_class_index(path: Path, dataset: Dataset) -> ClassIndex:
    """Read a class-index file; ids must belong to `dataset`."""
    names, presence, fingerprint, stamp = [], [], "", ""
    last = len(dataset.classes) - 1
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this class index: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            if line.startswith(FINGERPRINT):
                fingerprint = line.removeprefix(FINGERPRINT).strip()
            elif line.startswith(STAMP):
                stamp = line.removeprefix(STAMP).strip()
            continue
        name, *ids = line.split() or [""]
        try:
            shown = [int(c) for c in ids]
        except ValueError:
            raise UserError(f"{path}:{number}: {line!r} is not `name id id …`") from None
        if not name or any(not 1 <= c <= last for c in shown):
            raise UserError(f"{path}:{number}: {line!r}: allowed: a name, then class ids from 1 to {last}")
        names.append(name)
        presence.append(sum(1 << c for c in set(shown)))
    if not names:
        raise UserError(f"{path}: no image in this class index")
    return ClassIndex(tuple(names), tuple(presence), fingerprint or hashlib.sha256(text.encode()).hexdigest()[:16], stamp)


def write_class_index(path: Path, index: ClassIndex, files: Files) -> None:
    """Write a class-index file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# class index of data set {files.dataset.name}, {files.split}: image name, then the classes it shows"]
    lines += [FINGERPRINT + index.fingerprint, STAMP + index.stamp]
    lines += [" ".join([name, *map(str, class_ids(shows))]) for name, shows in zip(index.names, index.presence, strict=True)]
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    aside.replace(path)


def class_ids(shows: int) -> list[int]:
    """Class ids of a bit mask, ascending."""
    return [c for c in range(1, shows.bit_length()) if shows >> c & 1]


def build(files: Files, workers: int | None = None) -> ClassIndex:
    """Read every mask of a split with all cores (`workers` processes) and note which classes it shows."""
    workers = workers or len(os.sched_getaffinity(0))
    chunks = [files.names[i : i + 64] for i in range(0, len(files.names), 64)]
    presence: list[int] = []
    digest = hashlib.sha256()
    text = f"class index of {files.dataset.name} ({files.split})"

    def rows() -> Iterable[list[tuple[int, str]]]:
        if workers == 1 or len(chunks) < 4:
            yield from (_read_chunk(files, chunk) for chunk in chunks)
        else:
            with ProcessPoolExecutor(workers) as pool:
                yield from pool.map(_read_chunk, [files] * len(chunks), chunks)

    for chunk, found in zip(chunks, track(rows(), total=len(chunks), text=text), strict=True):
        for name, (shows, content) in zip(chunk, found, strict=True):
            presence.append(shows)
            digest.update(f"{name} {content}\n".encode())
    return ClassIndex(files.names, tuple(presence), digest.hexdigest()[:16])


def _read_chunk(files: Files, names: tuple[str, ...]) -> list[tuple[int, str]]:
    """Classes (bit mask) and content digest of some images; the image's size in bytes stands for its content."""
    from PIL import Image, UnidentifiedImageError

    ids = files.dataset.raw_to_id()
    rows = []
    for name in names:
        image, mask = files.image(name), files.mask(name)
        if not image.is_file():
            raise UserError(f"data set {files.dataset.name!r}, {files.split}: {image}: listed, but there is no such image")
        if not mask.is_file():
            raise UserError(f"data set {files.dataset.name!r}, {files.split}: image {image.name} has no mask; expected {mask}")
        _check_whole(image)
        try:
            with Image.open(mask) as label:
                mode, histogram = label.mode, label.histogram()
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise UserError(f"{mask}: cannot read this mask: {error}") from None
        values = [value for value, count in enumerate(histogram) if count]
        strange = [value for value in values if value not in ids]
        if strange or len(histogram) != 256:
            allowed = f"0 to {max(v for v in ids if v != 255)}" + (", 255 (void)" if 255 in ids else "")
            one_byte = len(histogram) == 256
            what = f"value {strange[0]} is no class of {files.dataset.name!r}" if one_byte else f"mode {mode!r} is not one byte a pixel"
            raise UserError(f"{mask}: {what}; allowed: {allowed}")
        shown = {ids[value] for value in values} - {0, 255}
        content = hashlib.sha256(mask.read_bytes()).hexdigest()[:16]
        rows.append((sum(1 << c for c in shown), f"{content} {image.stat().st_size}"))
    return rows


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
