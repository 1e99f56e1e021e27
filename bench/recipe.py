"""Recipes: every hyper-parameter of a run, typed and checked, and where its value comes from.

A value is looked up in this order, the last one found wins:

    the method's Config  <  [method]  <  the track  <  the variant  <  --set

[method], in the recipe beside the method's file, holds what belongs to the method itself and is the same in every track. The
track says how it is trained: "published" from the method's own recipe, "controlled" and "small" from bench/tracks.toml, the same for
every method. Each of the three knows values for everything, for one data set, and for one protocol:

    [method]                    [published]               [small]            (in bench/tracks.toml)
    [method.ade]                [published.voc]           [small.shapes]
    [method.voc-15-1]           [published.voc-10-1]

`like = "mib"` in a [published] table takes over the training settings of that method's recipe first. A method that wraps others
puts what holds around one of them alone into [on.<method>.method] and [on.<method>.published].
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench import shipped
from bench.errors import UserError, unknown
from bench.protocol import Protocol

if TYPE_CHECKING:
    from bench.registry import MethodSpec

TRACKS = ("published", "controlled", "small")
LABEL_LENGTH = 120
"""Settings in a label, which is a folder's name, are cut here."""
TRACK_FILE = Path(__file__).resolve().parent / "tracks.toml"


class _AfterFirstStep:
    """Marks a hyper-parameter that plays no part while step 0 trains."""


T = TypeVar("T")
Later = Annotated[T, _AfterFirstStep()]
"""`distillation: Later[float] = 10.0`: used from step 1 on, so changing it leaves step 0 as it is."""


class Settings(BaseModel):
    """How a step is trained, whatever the method. A method's Config adds its own hyper-parameters.

    Fields that begin with `first_` replace the field of the same name at step 0 (None: no difference).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    network: str = "deeplab-abn-resnet101"
    """Body and head; `bench list networks` names them."""
    norm: Literal["abn", "inplace"] = "abn"
    """Activated batch norm in plain PyTorch, or the memory-saving package inplace-abn (the same numbers)."""
    pretrained: str = ""
    """Weights of the body at step 0: "imagenet" (torchvision's weights API), the path of a checkpoint, or "" for none."""
    crop: int = Field(512, ge=8)
    """Side of the square training crop, and of the central square that is scored, in pixels."""
    augmentation: Literal["random-resized-crop", "scale-crop", "resize-scale-crop"] = "random-resized-crop"
    """Geometric training augmentation: MiB's, SSUL's or MBS's."""
    label_rule: Literal["mib", "plop", "ssul", "mbs", "eir"] = "plop"
    """What becomes of void, old and future pixels in training labels (bench/data/labels.py)."""
    epochs: int = Field(30, ge=1)
    """Passes over the step's images."""
    first_epochs: int | None = Field(None, ge=1)
    """Epochs of step 0."""
    batch_size: int = Field(24, ge=2)
    """Images of one update over all processes; one alone would leave the batch norm after image-level pooling nothing to normalise."""
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
    min_lr: float = Field(0.0, ge=0)
    """Floor of the poly schedule."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Nesterov momentum of SGD."""
    weight_decay: float = Field(1e-4, ge=0)
    """On every trained parameter, biases and norms included."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward and backward pass; fp16 with loss scaling."""
    selection: Literal["last", "best-on-test"] = "last"
    """Which iterate a step hands on: the last, or the one that scores best on the test images of its classes."""

    def at(self, index: int) -> dict[str, Any]:
        """Values in force at step `index`: first_* folded in, and what only later steps use left out at step 0."""
        values = {name: getattr(self, name) for name in type(self).model_fields if not name.startswith("first_")}
        for name in type(self).model_fields:
            if name.startswith("first_") and index == 0 and getattr(self, name) is not None:
                values[name.removeprefix("first_")] = getattr(self, name)
        for name, info in type(self).model_fields.items():
            later = any(isinstance(mark, _AfterFirstStep) for mark in info.metadata)
            if (index == 0 and later) or (index > 0 and name == "pretrained"):
                values.pop(name, None)
        return values


TRAINING = frozenset(Settings.model_fields)
"""Names of the settings that every method has."""


@dataclass(frozen=True)
class Recipe:
    """All values of a method on one protocol and track.

    Attributes:
        config: the checked values.
        sources: where each value came from, in words.
        label: the method's name as results carry it; values given by --set are part of it.
    """

    config: Any
    sources: Mapping[str, str]
    label: str


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a recipe file; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None


def layers(table: Mapping[str, Any], protocol: Protocol, where: str) -> list[tuple[str, dict[str, Any]]]:
    """(source, values) of a recipe table, from the general to the particular: itself, the data set's, the protocol's."""
    found = [(where, {k: v for k, v in table.items() if not isinstance(v, dict) and k != "like"})]
    for name, values in table.items():
        if isinstance(values, dict) and name == protocol.dataset.name:
            found.append((f"{where}, data set {name}", values))
    for name, values in table.items():
        if isinstance(values, dict) and name == protocol.name and name != protocol.dataset.name:
            found.append((f"{where}, protocol {name}", values))
    return found


def with_models(recipes: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[tuple[Path, Mapping[str, Any]]]:
    """Recipes, each after the one that its [published] table says it is like."""
    found: list[tuple[Path, Mapping[str, Any]]] = []
    for path, recipe in recipes:
        model = recipe.get("published", {}).get("like")
        if model:
            name = f"{model.replace('-', '_')}.toml"
            beside = next((f for f in (path.with_name(name), shipped.PACKAGE.parent / "methods" / name) if f.is_file()), None)
            if beside is None:
                raise UserError(f"{path}: [published] like = {model!r}: there is no {name} beside it or among the shipped methods")
            found.append((beside, {"published": training_only(read_toml(beside).get("published", {}))}))
        found.append((path, recipe))
    return found


def training_only(table: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe table without the method's own hyper-parameters."""
    return {k: training_only(v) if isinstance(v, dict) else v for k, v in table.items() if isinstance(v, dict) or k in TRAINING}


def around(spec: MethodSpec, kind: str, protocol: Protocol) -> list[tuple[str, dict[str, Any]]]:
    """(source, values) that a wrapper's recipe has for this wrapped method alone, in its table [on.<method>.<kind>]."""
    if spec.base is None:
        return []
    (path, recipe), wrapped = spec.recipes[-1], spec.base.name.partition("@")[0]
    return layers(recipe.get("on", {}).get(wrapped, {}).get(kind, {}), protocol, f"{path.name} [on.{wrapped}.{kind}]")


def resolve(spec: MethodSpec, protocol: Protocol, track: str, overrides: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """All hyper-parameters of a method on a protocol, checked, each with its source.

    Args:
        spec: the method, from the registry.
        protocol: decides data-set and protocol values.
        track: "published", "controlled" or "small".
        overrides: (key, value) pairs of --set that concern this method.

    Raises:
        UserError: unknown track or key, a value of the wrong type or out of range, or no published recipe for this data set.
    """
    if track not in TRACKS:
        raise unknown("track", track, TRACKS, where="--track")
    fields = spec.config.model_fields
    values: dict[str, Any] = {}
    sources = dict.fromkeys(fields, "default")
    stack: list[tuple[str, dict[str, Any]]] = []
    for path, recipe in spec.recipes:
        stack += layers(recipe.get("method", {}), protocol, f"{path.name} [method]")
    stack += around(spec, "method", protocol)
    if track == "published":
        if not any(protocol.dataset.name in recipe.get("published", {}) for _, recipe in with_models(spec.recipes)):
            raise UserError(f"{spec.name}: no published recipe for data set {protocol.dataset.name!r}; use --track small or --track controlled")
    else:
        stack += layers(read_toml(TRACK_FILE)[track], protocol, f"tracks.toml [{track}]")
    for path, recipe in with_models(spec.recipes):
        stack += layers(recipe.get(track, {}), protocol, f"{path.name} [{track}]")
    stack += around(spec, track, protocol)
    for path, variant, recipe in spec.variants:
        stack += layers(recipe, protocol, f"{path.name} [variant.{variant}]")
        stack += layers(recipe.get(track, {}), protocol, f"{path.name} [variant.{variant}.{track}]")
    stack.append(("--set", dict(overrides)))
    for source, found in stack:
        for key, value in found.items():
            if key not in fields:
                raise unknown("setting", key, fields, where=f"{source} of {spec.name}")
            values[key] = value
            sources[key] = source
    try:
        config = spec.config(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise UserError(f"{sources[key]}: {spec.name}.{key} = {first['input']!r}: {first['msg']}") from None
    given = ",".join(f"{key}={value}" for key, value in sorted(overrides)).replace("/", ":")  # a label is a folder's name
    if len(given) > LABEL_LENGTH:
        given = f"{given[:LABEL_LENGTH]}~{hashlib.sha256(given.encode()).hexdigest()[:8]}"
    return Recipe(config, sources, f"{spec.name}[{given}]" if given else spec.name)


def parse_overrides(items: Sequence[str]) -> list[tuple[str, str, Any]]:
    """`key=value` or `method.key=value` of --set as (method or "", key, value); values are read as TOML, else as text.

    Of a key that is given twice the last value counts.
    """
    parsed: dict[tuple[str, str], Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--set {item}: write key=value or method.key=value")
        method, _, key = name.strip().rpartition(".")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        parsed[method, key] = value
    return [(method, key, value) for (method, key), value in parsed.items()]


def overrides_for(spec: MethodSpec, parsed: Sequence[tuple[str, str, Any]], everybody: Sequence[MethodSpec]) -> list[tuple[str, Any]]:
    """The pairs of --set that concern one method. A key without a method must be known to every method of the run."""
    mine = []
    for method, key, value in parsed:
        if method:
            if method not in [other.name for other in everybody]:
                raise unknown("method", method, [other.name for other in everybody], where=f"--set {method}.{key}")
            if method == spec.name:
                mine.append((key, value))
            continue
        knowing = [other.name for other in everybody if key in other.config.model_fields]
        if not knowing:
            raise unknown("setting", key, {name for other in everybody for name in other.config.model_fields}, where="--set")
        if len(knowing) < len(everybody):
            raise UserError(f"--set {key}={value}: a setting of {', '.join(knowing)} alone; write {knowing[0]}.{key}={value}")
        mine.append((key, value))
    return mine
