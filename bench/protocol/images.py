"""Which training images a step sees: the settings of the field, as data.

* overlapped: every image that shows a class of the step, whatever else it shows. Old and future classes in it
  are labelled background: the background shift.
* disjoint: only images whose labelled classes are all old or of the step, so that no future class is ever
  seen as background.
* partition: MiB's ADE20K lists: a greedy partition in which each image belongs to one step (future classes
  can occur).

Images are known by their *presence*: one bit mask an image; bit c is set where class c (not 0, not void)
shows.

Source: MiB, data sets of the released code; spec/protocol.md section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.names import Registry


class Choice(Protocol):
    """Chooses the training images of a step.

    Example:
        >>> choose: Choice = overlapped
        >>> choose(classes=[2], seen=[0, 1, 2], groups=[[1], [2]], presence=[bits([1]), bits([1, 2])])
        [1]
    """

    def __call__(
        self,
        classes: Sequence[int],
        seen: Sequence[int],
        groups: Sequence[Sequence[int]],
        presence: Sequence[int],
    ) -> list[int]:
        """Positions of the images, ascending.

        Args:
            classes: ids that the step learns.
            seen: ids of all steps so far, with the step's own and with background.
            groups: ids of every step of the protocol; finer ones where a partition is made of finer steps.
            presence: one bit mask an image.
        """


@dataclass(frozen=True)
class Setting:
    """Which images a step sees.

    Attributes:
        says: one line for people.
        train_images: chooses them.

    Example:
        >>> SETTINGS.find("disjoint").says
        "images of the step's classes that show no future class"
    """

    says: str
    train_images: Choice


def bits(classes: Sequence[int]) -> int:
    """The bit mask of some class ids.

    Example:
        >>> f"{bits([1, 3]):b}"
        '1010'
    """
    return sum(1 << c for c in set(classes))


def showing(classes: Sequence[int], presence: Sequence[int]) -> list[int]:
    """Positions of the images that show one of the classes (background does not count), ascending.

    Example:
        >>> showing([0, 2], [bits([1]), bits([1, 2]), bits([2, 3])])
        [1, 2]
    """
    wanted = bits(classes) & ~1
    return [i for i, shows in enumerate(presence) if shows & wanted]


def overlapped(
    classes: Sequence[int], seen: Sequence[int], groups: Sequence[Sequence[int]], presence: Sequence[int]
) -> list[int]:
    """Every image that shows a class of the step.

    Example:
        >>> overlapped([2], [0, 1, 2], [[1], [2], [3]], [bits([1]), bits([1, 2]), bits([2, 3])])
        [1, 2]
    """
    return showing(classes, presence)


def disjoint(
    classes: Sequence[int], seen: Sequence[int], groups: Sequence[Sequence[int]], presence: Sequence[int]
) -> list[int]:
    """Every image that shows a class of the step and none that is still to come.

    Example:
        >>> disjoint([2], [0, 1, 2], [[1], [2], [3]], [bits([1]), bits([1, 2]), bits([2, 3])])  # 3 is future
        [1]
    """
    outside = ~bits(seen)
    return [i for i in showing(classes, presence) if not presence[i] & outside]


def partition(
    classes: Sequence[int], seen: Sequence[int], groups: Sequence[Sequence[int]], presence: Sequence[int]
) -> list[int]:
    """The images of the groups that make up the step, each of one group.

    Example:
        >>> groups, presence = [[1], [2]], [bits([1]), bits([1, 2]), bits([2])]
        >>> partition([1], [0, 1], groups, presence), partition([2], [0, 1, 2], groups, presence)
        ([0], [1, 2])
    """
    mine = {k for k, group in enumerate(groups) if set(group) <= set(classes)}
    return [i for i, k in enumerate(image_partition(presence, groups)) if k in mine]


def image_partition(
    presence: Sequence[int],
    groups: Sequence[Sequence[int]],
    ratio_weight: float = 120.0,
    rarity_weight: float = 1.0,
) -> list[int]:
    """MiB's greedy partition of ADE20K: the step of each image, -1 for an image without a labelled class.

    Images are visited class by class in ascending order; each goes to the step that owns its most urgent
    class, urgency weighing how far a class is from being used up against how rare it is in the image's
    company.

    Args:
        presence: one bit mask an image.
        groups: class ids per step.
        ratio_weight, rarity_weight: of how little of a class has been assigned, and of how rare it is beside
            the image's other classes.

    Example:
        >>> image_partition([bits([1]), bits([1, 2]), bits([2]), bits([])], [[1], [2]])  # 2 had none yet
        [0, 1, 1, -1]

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
            urgency = [
                ratio_weight * (1 - assigned[c] / total[c]) + rarity_weight * company / total[c]
                for c in classes
            ]
            step = step_of_class[classes[urgency.index(max(urgency))]]
            step_of_image[i] = step
            for c in classes:
                if step_of_class[c] == step:
                    assigned[c] += 1
    return step_of_image


SETTINGS: Registry[Setting] = Registry("setting", "bench.settings")
SETTINGS.add("overlapped", Setting("every image that shows a class of the step", overlapped))
SETTINGS.add("disjoint", Setting("images of the step's classes that show no future class", disjoint))
SETTINGS.add("partition", Setting("each image belongs to one step, as in MiB's lists of ADE20K", partition))
