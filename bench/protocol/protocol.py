"""Protocols: what is learned in which order, and which images belong to a step.

Vocabulary (Continuum, MiB): a *protocol* cuts the classes of a data set into *steps*; step 0 learns the first
classes, each later step some more. Background is class 0, never listed, always there. Which images a step
sees is the protocol's *setting* (`bench.protocol.images`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bench.data.dataset import Dataset
from bench.protocol.images import SETTINGS, showing


@dataclass(frozen=True)
class Step:
    """One step of a protocol.

    Attributes:
        index: 0 for the first step.
        classes: data set ids learned here, in channel order, without background.
        old: data set ids of all earlier steps, in channel order, without background.

    Example:
        >>> step = Step(1, (16,), (1, 2))
        >>> step.seen, step.n_classes, step.n_old, step.n_new
        ((0, 1, 2, 16), 4, 3, 1)
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
        setting: a name of bench.protocol.images.SETTINGS.
        groups: data set ids per step, without background.
        title: for people.
        partition_groups: the finer groups whose partition decides the images of "partition" (ADE 100-50
            merges 100-10).
        version: raised when the file is given another meaning.

    Example:
        >>> from bench.protocol import load
        >>> protocol = load("voc-15-1")
        >>> protocol.groups[1:], [step.n_classes for step in protocol.steps]
        (((16,), (17,), (18,), (19,), (20,)), [16, 17, 18, 19, 20, 21])
    """

    name: str
    dataset: Dataset
    setting: str
    groups: tuple[tuple[int, ...], ...]
    title: str = ""
    partition_groups: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    version: int = 1

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
        """The joint form: all classes in one step, in the same channel order.

        Example:
            >>> from bench.protocol import load
            >>> [step.n_classes for step in load("voc-15-5").at_once().steps]
            [21]
        """
        return replace(self, groups=(self.order[1:],), partition_groups=())

    # ---- which images belong to a step ---------------------------------------------------------------------

    def train_images(self, index: int, presence: Sequence[int]) -> list[int]:
        """Positions of the training images of step `index`, ascending.

        Args:
            index: the step.
            presence: one bit mask an image; bit c is set where class c (not 0, not void) shows.

        Example:
            >>> from bench.protocol import load
            >>> presence = [1 << 16, 1 << 16 | 1 << 17, 1 << 17]  # 16, both, 17
            >>> [load("voc-15-1", how).train_images(1, presence) for how in ("overlapped", "disjoint")]
            [[0, 1], [0]]
        """
        step = self.step(index)
        choose = SETTINGS.find(self.setting, f"protocol {self.name!r}: setting").train_images
        return choose(step.classes, step.seen, self.partition_groups or self.groups, presence)

    def test_images(self, index: int, presence: Sequence[int]) -> list[int]:
        """Positions of the test images that show at least one class seen up to step `index`, ascending.

        Example:
            >>> from bench.protocol import load
            >>> load("voc-15-1").test_images(0, [1 << 3, 1 << 16])  # 16 comes later
            [0]
        """
        return showing(self.step(index).seen, presence)

    def validation_images(self, index: int, presence: Sequence[int]) -> list[int]:
        """Positions of the test images that show a class of step `index`, ascending (for validation).

        Example:
            >>> from bench.protocol import load
            >>> load("voc-15-1").validation_images(1, [1 << 3, 1 << 16])
            [1]
        """
        return showing(self.groups[index], presence)
