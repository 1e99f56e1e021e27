"""Conventions: how confusion counts become a number, as data.

"mIoU all" is more than one quantity: the authors average with or without background, ignore future classes or
count them as background, leave out images without a seen class or keep them, and disagree on classes that do
not occur.

Source: spec/protocol.md section 9, spec/ssul.md section 10, spec/mbs.md section 6, spec/eir.md section 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.names import Registry

EPSILON = 1e-6


@dataclass(frozen=True)
class Convention:
    """How counts become a number.

    Attributes:
        labels: the label rule whose test view applies (what future classes and background are, which images
            are tested).
        background: background is one of the averaged classes.
        absent: a class without a test pixel is left out of the means ("exclude"), or counts as 0 ("zero");
            "nonzero" leaves a class whose IoU is exactly 0 out of "all", and counts it in "old" and "new".
        says: one line for people.
        epsilon: added to the denominator; EIR subtracts it.
        background_is_old: background is also one of the old classes.

    Example:
        >>> convention("mib").background, convention("default").background  # "mIoU all" is two metrics
        (False, True)
    """

    labels: str
    background: bool
    absent: Literal["exclude", "zero", "nonzero"]
    says: str
    epsilon: float = EPSILON
    background_is_old: bool = True


CONVENTIONS: Registry[Convention] = Registry("convention", "bench.conventions")
CONVENTIONS.add(
    "default",
    Convention(
        "plop",
        True,
        "exclude",
        "background in the mean, pixels of future classes are background, "
        "images without a seen class left out, absent classes left out",
    ),
)
CONVENTIONS.add(
    "mib",
    Convention(
        "mib",
        False,
        "exclude",
        "background not in the mean, pixels of future classes ignored, images without a seen class left out, "
        "absent classes left out",
    ),
)
CONVENTIONS.add(
    "ssul",
    Convention(
        "ssul",
        True,
        "zero",
        "background in the mean, pixels of future classes ignored, all images, absent classes count as 0",
    ),
)
CONVENTIONS.add(
    "mbs",
    Convention(
        "mbs",
        True,
        "nonzero",
        "background in all but not in old, pixels of future classes ignored, all images, "
        "classes at exactly 0 left out of all, not of old and new",
        background_is_old=False,
    ),
)
CONVENTIONS.add(
    "eir",
    Convention(
        "eir",
        True,
        "zero",
        "background in the mean, pixels of future classes are background, "
        "images without a seen class left out, absent classes count as 0",
        -EPSILON,
    ),
)


def convention(name: str) -> Convention:
    """The convention of that name.

    Example:
        >>> convention("ssul").absent
        'zero'
    """
    return CONVENTIONS.find(name, "--convention")
