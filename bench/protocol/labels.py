"""The label view of a step: what a mask value becomes in training, validation and test.

The authors differ, so a *label rule* is data with a name. Each rule says, for each of the three uses, what
becomes of the four kinds of pixel that are not of the step's own classes. A view turns into one look-up table
of 256 entries, and remapping an image is one indexing operation.

Source: spec/protocol.md section 3, from the released code of MiB, PLOP (and NeST), SSUL, MBS and EIR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from bench.data.dataset import IGNORE, Dataset
from bench.names import Registry
from bench.protocol.protocol import Protocol, Step

if TYPE_CHECKING:
    import numpy as np

INDEX = -1
"""In a view: the class keeps its channel index."""


class View(NamedTuple):
    """What becomes of each kind of pixel: 0 (background), 255 (ignored) or INDEX (its own channel).

    Example:
        >>> rule("mib").test
        View(background=0, old=-1, future=255, void=255)
    """

    background: int
    old: int
    future: int
    void: int


@dataclass(frozen=True)
class LabelRule:
    """How one family of authors treats pixels outside the step's classes.

    Attributes:
        train, validation, test: the three views where 0 is a class of its own (VOC).
        unlabelled: the same three where 0 means "none of the classes" (ADE20K); the same as above if absent.
        tests_all: the test set keeps all images; the others drop images without a seen class.
        own_setting: validation images are chosen by the protocol's setting; the others always overlapped. In
            a disjoint protocol the old classes are all ids below the step's first, which is right only for
            ascending class orders.
        note: what a fair comparison must not hide, or "".

    Example:
        >>> rule("mib").train.void, rule("plop").train.void  # MiB trains void pixels as background
        (0, 255)
    """

    train: View
    validation: View
    test: View
    unlabelled: tuple[View, View, View] | None = None
    tests_all: bool = False
    own_setting: bool = False
    note: str = ""

    def view(self, use: str, dataset: Dataset) -> View:
        """The view for "train", "validation" or "test".

        Example:
            >>> from bench.data.dataset import load_dataset
            >>> [rule("plop").view("train", load_dataset(name)).void for name in ("voc", "ade")]
            [255, 0]
        """
        views = (self.train, self.validation, self.test)
        if dataset.background == "unlabelled" and self.unlabelled:
            views = self.unlabelled
        return views[("train", "validation", "test").index(use)]

    def images(self, use: str, protocol: Protocol, index: int, presence: Sequence[int]) -> list[int]:
        """Positions of the images of step `index` for "train", "validation" or "test", ascending.

        Args:
            presence: one bit mask an image, of the training split for "train", else of the test split.

        Example:
            >>> from bench.protocol import load
            >>> presence = [1 << 3, 1 << 16]  # 16 is learned in the next step
            >>> [rule(name).images("test", load("voc-15-1"), 0, presence) for name in ("plop", "ssul")]
            [[0], [0, 1]]
        """
        if use == "test":
            return list(range(len(presence))) if self.tests_all else protocol.test_images(index, presence)
        if use == "validation" and not self.own_setting:
            return protocol.validation_images(index, presence)
        if self.own_setting and protocol.setting == "disjoint":
            new = protocol.groups[index]
            return replace(protocol, groups=(tuple(range(1, new[0])), new)).train_images(1, presence)
        return protocol.train_images(index, presence)


_PLAIN = View(0, 0, 0, IGNORE)
_PLAIN_ADE = View(0, 0, 0, 0)

_BUILT_IN = {
    "mib": LabelRule(
        train=View(0, 0, 0, 0),
        validation=View(0, IGNORE, IGNORE, IGNORE),
        test=View(0, INDEX, IGNORE, IGNORE),
        unlabelled=(
            View(0, 0, 0, 0),
            View(IGNORE, IGNORE, IGNORE, IGNORE),
            View(IGNORE, INDEX, IGNORE, IGNORE),
        ),
        note="void pixels are trained as background",
    ),
    "plop": LabelRule(
        train=_PLAIN,
        validation=_PLAIN,
        test=View(0, INDEX, 0, IGNORE),
        unlabelled=(_PLAIN_ADE, _PLAIN_ADE, View(0, INDEX, 0, 0)),
    ),
    # PLOP's option --ignore_test_bg: no score on background and future classes.
    "plop-ignore-background": LabelRule(
        train=_PLAIN,
        validation=_PLAIN,
        test=View(IGNORE, INDEX, IGNORE, IGNORE),
        unlabelled=(_PLAIN_ADE, _PLAIN_ADE, View(IGNORE, INDEX, IGNORE, IGNORE)),
    ),
    "ssul": LabelRule(
        train=_PLAIN,
        validation=_PLAIN,
        test=View(0, INDEX, INDEX, IGNORE),
        tests_all=True,
        own_setting=True,
    ),
    "mbs": LabelRule(
        train=_PLAIN,
        validation=_PLAIN,
        test=View(0, INDEX, INDEX, IGNORE),
        unlabelled=(_PLAIN_ADE, _PLAIN_ADE, View(IGNORE, INDEX, INDEX, IGNORE)),
        tests_all=True,
        own_setting=True,
    ),
    "eir": LabelRule(
        train=_PLAIN,
        validation=_PLAIN,
        test=View(0, INDEX, 0, IGNORE),
        unlabelled=(_PLAIN, _PLAIN, View(0, INDEX, IGNORE, IGNORE)),
    ),
}


RULES: Registry[LabelRule] = Registry("label rule", "bench.label_rules")
for _name, _rule in _BUILT_IN.items():
    RULES.add(_name, _rule)


def rule(name: str) -> LabelRule:
    """The label rule of that name.

    Example:
        >>> rule("ssul").tests_all
        True
    """
    return RULES.find(name)


def labels_by_class(view: View, n_classes: int, order: Sequence[int], step: Step) -> list[int]:
    """The label of each class id under a view.

    Args:
        view: what becomes of the pixels outside the step's classes.
        n_classes: of the data set, background included.
        order: class ids in channel order over all steps, background first; a class that is not in it becomes
            255.
        step: its classes always keep their channel.

    Example:
        >>> view, step = View(background=0, old=INDEX, future=255, void=255), Step(1, (3,), (1,))
        >>> labels_by_class(view, n_classes=5, order=(0, 1, 3, 2, 4), step=step)
        [0, 1, 255, 2, 255]
    """
    channel = {c: k for k, c in enumerate(order)}
    new, old = set(step.classes), set(step.old)
    labels = [view.background]
    for c in range(1, n_classes):
        kind = INDEX if c in new else view.old if c in old else view.future
        labels.append(channel.get(c, IGNORE) if kind == INDEX else kind)
    return labels


def lookup_table(view: View, dataset: Dataset, order: Sequence[int], step: Step) -> np.ndarray:
    """The table that turns mask values into labels: uint8 [256]. A value of no class becomes 255.

    Example:
        >>> from bench.data.dataset import load_dataset
        >>> view, step = View(background=0, old=INDEX, future=0, void=255), Step(1, (3,), (1,))
        >>> lookup_table(view, load_dataset("voc"), (0, 1, 3), step)[[0, 1, 2, 3, 255]].tolist()
        [0, 1, 0, 2, 255]
    """
    import numpy as np

    labels = labels_by_class(view, len(dataset.classes), order, step)
    table = np.full(256, IGNORE, np.uint8)
    for value, c in dataset.raw_to_id().items():
        table[value] = view.void if c == IGNORE else labels[c]
    return table


def training_table(protocol: Protocol, index: int, rule_name: str) -> np.ndarray:
    """The look-up table of the training labels of a step, uint8 [256].

    Example:
        >>> from bench.protocol import load
        >>> training_table(load("voc-15-1"), 1, "plop")[[0, 15, 16, 17, 255]].tolist()
        [0, 0, 16, 0, 255]
    """
    view = rule(rule_name).view("train", protocol.dataset)
    return lookup_table(view, protocol.dataset, protocol.order, protocol.step(index))
