"""Protocols: what is learned in which order, and which images belong to a step.

Vocabulary (Continuum, MiB): a *protocol* cuts the classes of a data set into *steps*; step 0 learns the first classes, each
later step some more. Background is class 0, never listed, always there. Which images may a step see?

* overlapped: every image that shows a class of the step, whatever else it shows. Old and future classes in it are labelled
  background: the background shift.
* disjoint: only images whose labelled classes are all old or of the step, so that no future class is ever seen as background.
* partition: MiB's ADE20K lists: a greedy partition in which each image belongs to one step (future classes can occur).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import shipped
from bench.data.dataset import Dataset, load_dataset
from bench.errors import UserError, unknown
from bench.store import RESERVED

SETTINGS = ("overlapped", "disjoint", "partition")
KEYS = ("title", "dataset", "setting", "first", "then", "order", "steps", "partition_of")


@dataclass(frozen=True)
class Step:
    """One step of a protocol.

    Attributes:
        index: 0 for the first step.
        classes: data set ids learned here, in channel order, without background.
        old: data set ids of all earlier steps, in channel order, without background.
    """

    index: int
    classes: tuple[int, ...]
    old: tuple[int, ...]

    @property
    def seen(self) -> tuple[int, ...]:
        """Data set ids of channels 0 … n_classes-1, background first."""
        return (0, *self.old, *self.classes)

    @property
    def n_classes(self) -> int:
        """Channels after this step, background included."""
        return len(self.old) + len(self.classes) + 1

    @property
    def n_old(self) -> int:
        """Channels before this step, background included; 0 at step 0."""
        return len(self.old) + 1 if self.index else 0

    @property
    def n_new(self) -> int:
        """Channels added by this step; at step 0 background is one of them."""
        return self.n_classes - self.n_old


@dataclass(frozen=True)
class Protocol:
    """An expanded protocol.

    Attributes:
        name: file name without suffix; the setting is appended unless it is overlapped.
        dataset: the data set whose classes are learned.
        setting: "overlapped", "disjoint" or "partition".
        groups: data set ids per step, without background.
        partition_groups: the finer groups whose partition decides the images of "partition" (ADE 100-50 merges 100-10).
    """

    name: str
    dataset: Dataset
    setting: str
    groups: tuple[tuple[int, ...], ...]
    title: str = ""
    partition_groups: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @property
    def label(self) -> str:
        """The name that results carry: the setting is part of it unless it is the default."""
        return self.name if self.setting == "overlapped" else f"{self.name}-{self.setting}"

    @property
    def order(self) -> tuple[int, ...]:
        """Data set ids in channel order, background first."""
        return (0, *(c for group in self.groups for c in group))

    def step(self, index: int) -> Step:
        return Step(index, self.groups[index], tuple(c for group in self.groups[:index] for c in group))

    @property
    def steps(self) -> list[Step]:
        return [self.step(t) for t in range(len(self.groups))]

    def at_once(self) -> Protocol:
        """The joint form: all classes in one step, in the same channel order."""
        return replace(self, groups=(self.order[1:],), partition_groups=())

    # ---- which images belong to a step ---------------------------------------------------------------------------------

    def train_images(self, index: int, presence: Sequence[int]) -> list[int]:
        """Positions of the training images of step `index`, ascending.

        Args:
            index: the step.
            presence: one bit mask an image; bit c is set where class c (not 0, not void) shows.

        Source: MiB, data sets of the released code; spec/protocol.md section 2.
        """
        step = self.step(index)
        if self.setting == "partition":
            return self._partitioned(step, presence)
        new = bits(step.classes)
        if self.setting == "overlapped":
            return [i for i, shows in enumerate(presence) if shows & new]
        outside = ~bits(step.seen)
        return [i for i, shows in enumerate(presence) if shows & new and not shows & outside]

    def test_images(self, index: int, presence: Sequence[int]) -> list[int]:
        """Positions of the test images that show at least one class seen up to step `index`, ascending."""
        seen = bits(self.step(index).seen)
        return [i for i, shows in enumerate(presence) if shows & seen & ~1]

    def validation_images(self, index: int, presence: Sequence[int]) -> list[int]:
        """Positions of the test images that show a class of step `index`, ascending (validation while training)."""
        new = bits(self.groups[index])
        return [i for i, shows in enumerate(presence) if shows & new]

    def _partitioned(self, step: Step, presence: Sequence[int]) -> list[int]:
        fine = self.partition_groups or self.groups
        mine = {k for k, group in enumerate(fine) if set(group) <= set(step.classes)}
        return [i for i, k in enumerate(image_partition(presence, fine)) if k in mine]


def bits(classes: Sequence[int]) -> int:
    """The bit mask of some class ids."""
    return sum(1 << c for c in set(classes))


def image_partition(presence: Sequence[int], groups: Sequence[Sequence[int]], ratio_weight: float = 120.0, rarity_weight: float = 1.0) -> list[int]:
    """MiB's greedy partition of ADE20K: the step of each image, -1 for an image without a labelled class.

    Images are visited class by class in ascending order; each goes to the step that owns its most urgent class, urgency
    weighing how far a class is from being used up against how rare it is in the image's company.

    Args:
        presence: one bit mask an image.
        groups: class ids per step.
        ratio_weight, rarity_weight: of how little of a class has been assigned, and of how rare it is beside the image's other classes.

    Source: recovered from the lists that MiB ships; spec/protocol.md section 2.1.
    """
    step_of_class = {c: k for k, group in enumerate(groups) for c in group if c}
    shown = [[c for c in sorted(step_of_class) if shows >> c & 1] for shows in presence]
    images_of: dict[int, list[int]] = {c: [] for c in sorted(step_of_class)}
    for i, classes in enumerate(shown):
        for c in classes:
            images_of[c].append(i)
    total = {c: len(images) for c, images in images_of.items()}
    assigned = dict.fromkeys(total, 0)
    step_of_image = [-1] * len(presence)
    for images in images_of.values():
        for i in images:
            if step_of_image[i] >= 0:
                continue
            classes = shown[i]
            company = sum(total[c] for c in classes)
            urgency = [ratio_weight * (1 - assigned[c] / total[c]) + rarity_weight * company / total[c] for c in classes]
            step = step_of_class[classes[urgency.index(max(urgency))]]
            step_of_image[i] = step
            for c in classes:
                if step_of_class[c] == step:
                    assigned[c] += 1
    return step_of_image


# ---- files -------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The shipped protocols."""
    return sorted(path.stem for path in shipped.folder("protocols").glob("*.toml"))


def load(name: str | Path, setting: str | None = None) -> Protocol:
    """Read a protocol by its shipped name, or from a TOML file.

    Args:
        name: "voc-15-1", or a path that ends in .toml.
        setting: "overlapped", "disjoint" or "partition"; the file's own if None.

    Raises:
        UserError: no such protocol, or a file that does not hold (one line naming file, key, value and cure).
    """
    path = Path(name) if str(name).endswith(".toml") else shipped.folder("protocols") / f"{name}.toml"
    if not path.is_file():
        if path.suffix == ".toml" and path == Path(name):
            raise UserError(f"{path}: no such protocol file")
        raise unknown("protocol", name, names())
    return parse(_read(path), path, setting)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None


def parse(content: dict[str, Any], path: Path, setting: str | None = None) -> Protocol:
    """Check the content of a protocol file and expand it; `path` names it in errors and finds its neighbours."""
    for key in content:
        if key not in KEYS:
            raise unknown("key", key, KEYS, where=str(path))
    if not isinstance(content.get("dataset"), str):
        raise UserError(f'{path}: dataset: missing; write for example dataset = "voc"')
    dataset = load_dataset(content["dataset"], beside=path)
    chosen = setting or content.get("setting", "overlapped")
    if chosen not in SETTINGS:
        raise unknown("setting", chosen, SETTINGS, where="--setting" if setting else f"{path}: setting")
    if path.stem in RESERVED or path.stem.startswith("."):
        raise UserError(f"{path}: a protocol cannot be called {path.stem!r}: results keep other things under that name")
    groups = _groups(content, dataset, path)
    partition: tuple[tuple[int, ...], ...] = ()
    if "partition_of" in content:
        finer = path.parent / f"{content['partition_of']}.toml"
        if not finer.is_file():
            raise UserError(f"{path}: partition_of: {finer}: no such protocol file")
        partition = _groups(_read(finer), dataset, finer)
        if any(not any(set(group) <= set(coarse) for coarse in groups) for group in partition):
            raise UserError(f"{path}: partition_of: the steps of {content['partition_of']!r} do not refine the steps here")
    return Protocol(path.stem, dataset, chosen, groups, str(content.get("title", "")), partition)


def _groups(content: dict[str, Any], dataset: Dataset, path: Path) -> tuple[tuple[int, ...], ...]:
    """Class ids per step from `steps`, or from `first`, `then` and `order`."""
    last = len(dataset.classes) - 1
    if "steps" in content:
        for key in ("first", "then", "order"):
            if key in content:
                raise UserError(f"{path}: {key}: give either steps, or first and then (with order), not both")
        steps = content["steps"]
        if not isinstance(steps, list) or not all(isinstance(group, list) for group in steps):
            raise UserError(f"{path}: steps: {steps!r} is not a list of lists of class ids, as in [[1, 2, 3], [4]]")
    else:
        order = content.get("order", list(range(1, last + 1)))
        if not isinstance(order, list):
            raise UserError(f"{path}: order: {order!r} is not a list of class ids")
        sizes = {}
        for key, default in (("first", None), ("then", None)):
            value = content.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                found = "missing" if value is None else f"{value!r} is not a number of classes"
                raise UserError(f"{path}: {key}: {found}; allowed: 1 to {last} (or give steps = [[…], …])")
            sizes[key] = value
        first, then = sizes["first"], sizes["then"]
        if first > len(order):
            raise UserError(f"{path}: first: {first} classes, but the order has only {len(order)}")
        if (len(order) - first) % then:
            raise UserError(f"{path}: then: {len(order) - first} classes are left after the first {first}; {then} does not divide them")
        steps = [order[:first], *(order[i : i + then] for i in range(first, len(order), then))]
    if not steps:
        raise UserError(f"{path}: steps: empty; a protocol has at least one step")
    where: dict[int, int] = {}
    for t, group in enumerate(steps):
        if not group:
            raise UserError(f"{path}: steps: step {t} is empty; each step learns at least one class")
        for c in group:
            if not isinstance(c, int) or isinstance(c, bool) or not 1 <= c <= last:
                raise UserError(
                    f"{path}: steps: step {t}: class {c!r} is out of range; "
                    f"allowed: 1 to {last} of data set {dataset.name!r} (background 0 is always there)"
                )
            if c in where:
                raise UserError(f"{path}: steps: class {c} ({dataset.classes[c]}) is in step {where[c]} and in step {t}; once is allowed")
            where[c] = t
    return tuple(tuple(group) for group in steps)
