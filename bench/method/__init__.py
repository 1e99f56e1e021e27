"""What a method sees: one face to import from. Names that need torch are loaded when they are first asked
for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bench.data.augment import AUGMENTATIONS
from bench.data.dataset import IGNORE
from bench.lazy import at_least_float32
from bench.method import replay
from bench.method.interface import Batches, Length, Method, Phase, State
from bench.method.losses import cross_entropy, cross_entropy_map
from bench.method.regulariser import Recorder, Regularised, Tensors, min_max_normalised, quadratic_penalty
from bench.method.schedule import Group, Rate, groups, learning_rate, scheduled
from bench.method.settings import First, Free, Later, Neutral, Settings
from bench.models.build import (
    BODIES,
    CLASSIFIERS,
    NETWORKS,
    Assembled,
    BodyKind,
    ClassifierKind,
    ClassTokens,
)
from bench.protocol.labels import RULES
from bench.protocol.protocol import Protocol, Step
from bench.seeds import mix

if TYPE_CHECKING:
    from bench.data.images import Images, ImageStore, Sample
    from bench.method.batch import Batch, normalise
    from bench.method.step_data import StepData
    from bench.models.network import Network, Output

_LAZY = {
    "Batch": "bench.method.batch",
    "normalise": "bench.method.batch",
    "StepData": "bench.method.step_data",
    "Images": "bench.data.images",
    "ImageStore": "bench.data.images",
    "Sample": "bench.data.images",
    "Network": "bench.models.network",
    "Output": "bench.models.network",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "AUGMENTATIONS",
    "BODIES",
    "CLASSIFIERS",
    "IGNORE",
    "NETWORKS",
    "RULES",
    "Assembled",
    "Batch",
    "Batches",
    "BodyKind",
    "ClassTokens",
    "ClassifierKind",
    "First",
    "Free",
    "Group",
    "ImageStore",
    "Images",
    "Later",
    "Length",
    "Method",
    "Network",
    "Neutral",
    "Output",
    "Phase",
    "Protocol",
    "Rate",
    "Recorder",
    "Regularised",
    "Sample",
    "Settings",
    "State",
    "Step",
    "StepData",
    "Tensors",
    "at_least_float32",
    "cross_entropy",
    "cross_entropy_map",
    "groups",
    "learning_rate",
    "min_max_normalised",
    "mix",
    "normalise",
    "quadratic_penalty",
    "replay",
    "scheduled",
]
