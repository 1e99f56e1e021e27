"""Settings: every hyper-parameter of a step, typed and documented, and how each enters the key of a job.

A field's mark says what it decides (a field without one is in the key of every step):

    Later[T]                       plays no part while step 0 trains, so changing it leaves step 0 as it is
    First[T]                       plays a part while step 0 trains alone
    Annotated[T, Neutral(value)]   in the key unless it has this value: what comes later leaves old keys alone
    Free[T]                        never in the key: it decides where or how fast, not what

A field `first_x` replaces the field `x` at step 0 (None: no difference).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, JsonValue

from bench.files import Table

FIRST = "first_"


@dataclass(frozen=True)
class Neutral:
    """Marks a setting that is in the key unless it has this value."""

    value: Any


@dataclass(frozen=True)
class _Mark:
    name: str


_LATER, _FIRST, _FREE = _Mark("later"), _Mark("first"), _Mark("free")

T = TypeVar("T")
Later = Annotated[T, _LATER]
First = Annotated[T, _FIRST]
Free = Annotated[T, _FREE]


class Settings(Table):
    """How a step is trained, whatever the method. A method's Config adds its own hyper-parameters."""

    network: str = "deeplab-abn-resnet101"
    """Body and head; `bench list networks` names them."""
    norm: Free[Literal["abn", "inplace"]] = "abn"
    """Activated batch norm in plain PyTorch, or the memory-saving package inplace-abn (the same numbers)."""
    pretrained: First[str] = ""
    """Weights of the body at step 0: "imagenet" (torchvision's weights API), the path of a checkpoint, or ""
    for none."""
    crop: int = Field(512, ge=8)
    """Side of the square training crop, and of the central square that is scored, in pixels."""
    augmentation: str = "random-resized-crop"
    """Geometric training augmentation: random-resized-crop (MiB's), scale-crop (SSUL's), resize-scale-crop
    (MBS's)."""
    label_rule: str = "plop"
    """What becomes of void, old and future pixels in training labels: mib, plop, ssul, mbs, eir."""
    epochs: int = Field(30, ge=1)
    """Passes over the step's images."""
    first_epochs: int | None = Field(None, ge=1)
    """Epochs of step 0."""
    batch_size: int = Field(24, ge=2)
    """Images of one update over all processes; one alone would leave the batch norm after image-level pooling
    nothing to normalise."""
    lr: float = Field(0.001, gt=0)
    """Learning rate at the start of a step."""
    first_lr: float | None = Field(0.01, gt=0)
    """Learning rate at the start of step 0."""
    body_lr: float = Field(1.0, ge=0)
    """Factor on the learning rate for the body."""
    first_body_lr: float | None = Field(None, ge=0)
    """The same at step 0."""
    schedule: Literal["poly", "warm-poly", "constant"] = "poly"
    """Learning rate over a step's iterations."""
    power: float = Field(0.9, gt=0)
    """Exponent of the poly schedules."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the iterations over which warm-poly rises linearly from a thousandth."""
    warmup_rounding: Annotated[Literal["down", "none"], Neutral("down")] = "down"
    """Whether that share is rounded down to whole iterations (SSUL) or not (DKD)."""
    min_lr: float = Field(0.0, ge=0)
    """Floor of the poly schedule."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Nesterov momentum of SGD."""
    weight_decay: float = Field(1e-4, ge=0)
    """On every trained parameter, biases and norms included."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Of the forward and backward pass; fp16 with loss scaling; fp64 for proofs, on a CPU."""
    test_precision: Annotated[Literal["as-training", "fp32"], Neutral("as-training")] = "as-training"
    """Of tests, validations and passes that look through images for a memory: as in training, or fp32
    throughout."""
    selection: Literal["last", "best-on-test"] = "last"
    """Which iterate a step hands on: the last, or the one that scores best on the test images of its
    classes."""
    checkpoint_minutes: Free[float] = Field(5.0, ge=0)
    """Minutes of training between two checkpoints; there is one at the end of each phase too, and one when a
    signal ends the job. 0: after every iteration."""
    threads: int = Field(1, ge=1)
    """CPU threads of a job that trains on a CPU. They decide the order of sums, so the last bits: more cores
    mean more jobs at once, never other numbers."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name in cls.model_fields:
            if name.startswith(FIRST) and name.removeprefix(FIRST) not in cls.model_fields:
                raise TypeError(
                    f"{cls.__module__}.{cls.__qualname__}: {name}: no field {name.removeprefix(FIRST)!r}"
                )

    @classmethod
    def is_free(cls, name: str) -> bool:
        """Whether a field decides nothing of the outcome."""
        return _FREE in cls.model_fields[name].metadata

    def at(self, index: int) -> Self:
        """The settings in force at step `index`: at step 0 each `first_x` that is not None stands in x."""
        if index:
            return self
        changes = {
            name.removeprefix(FIRST): getattr(self, name)
            for name in type(self).model_fields
            if name.startswith(FIRST)
        }
        return self.model_copy(update={name: value for name, value in changes.items() if value is not None})

    def keyed(self, index: int) -> dict[str, JsonValue]:
        """What enters the key of step `index`, by name."""
        folded = self.at(index)
        values: dict[str, JsonValue] = {}
        for name, marks in _marked(type(self)):
            value = getattr(folded, name)
            if _FREE in marks or (_LATER in marks and not index) or (_FIRST in marks and index):
                continue
            if not any(isinstance(mark, Neutral) and mark.value == value for mark in marks):
                values[name] = list(value) if isinstance(value, tuple) else value
        return values


@functools.cache
def _marked(settings: type[Settings]) -> list[tuple[str, list[Any]]]:
    """Fields of some settings with their marks, those that only replace another at step 0 left out."""
    fields = settings.model_fields.items()
    return [(name, list(info.metadata)) for name, info in fields if not name.startswith(FIRST)]


TRAINING = frozenset(Settings.model_fields)
"""Names of the settings that every method has."""
