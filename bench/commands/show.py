"""`bench show`: a protocol with its classes and images, or a method with every value and its source."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue
from tabulate import tabulate

from bench.commands import options
from bench.data.dataset import Dataset
from bench.data.index import ClassIndex, class_indexes, read_class_index
from bench.data.locate import locate
from bench.errors import UserError
from bench.protocol.file import load

EXAMPLES = """examples:
  bench show protocol voc-15-1 --data-root ~/VOCdevkit
  bench show method plop --protocol voc-15-1 --track published"""
DEFAULT_PROTOCOL = "voc-15-1"
WIDTH = 90
"""Characters of the last column."""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    kinds = parser.add_subparsers(dest="kind", metavar="protocol|method", required=True)
    protocol = kinds.add_parser("protocol", help="classes by name, and image counts per step")
    protocol.add_argument("name")
    protocol.add_argument("--setting", help="a name of bench list settings")
    options.add_data_option(protocol)
    index = "count images by this class-index file (training split) alone"
    protocol.add_argument("--class-index", metavar="FILE", help=index)
    protocol.add_argument("--indices", action="store_true", help="add the training image list of each step")
    options.add_json_option(protocol)
    method = kinds.add_parser("method", help="what a method is, and every hyper-parameter with its source")
    method.add_argument("name")
    whose = f"the protocol whose recipe is resolved (default: {DEFAULT_PROTOCOL})"
    method.add_argument("--protocol", metavar="NAME", default=DEFAULT_PROTOCOL, help=whose)
    method.add_argument("--track", help="a name of bench list tracks (default: the data set's)")
    options.add_set_option(method, "as in bench run")
    options.add_json_option(method)


def run(args: argparse.Namespace) -> int:
    """Print one thing."""
    if args.kind == "protocol":
        shown = show_protocol(args.name, args.setting, args.data_root, args.class_index, args.indices)
        print(json.dumps(shown.as_json()) if args.json else protocol_text(shown))
    else:
        found = show_method(args.name, args.protocol, args.track, args.overrides)
        print(json.dumps(asdict(found), indent=1) if args.json else method_text(found))
    return 0


# ---- a protocol --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShownStep:
    """A step: its classes' names by id, and its images where they are known."""

    step: int
    classes: Mapping[int, str]
    train_images: int | None = None
    test_images: int | None = None
    train_indices: list[int] | None = None
    train_names: list[str] | None = None


@dataclass(frozen=True)
class ShownProtocol:
    """A protocol, expanded."""

    name: str
    title: str
    data_set: str
    setting: str
    order: tuple[int, ...]
    steps: list[ShownStep]

    def as_json(self) -> dict[str, JsonValue]:
        """For machines; what is not known is left out."""
        values = asdict(self)
        values["steps"] = [{k: v for k, v in step.items() if v is not None} for step in values["steps"]]
        return values


def show_protocol(
    name: str,
    setting: str | None = None,
    data_root: str | None = None,
    index_file: str | None = None,
    indices: bool = False,
) -> ShownProtocol:
    """A protocol expanded, with image counts per step when the data or a class index is there."""
    p = load(name, setting)
    index = _indexes(p.dataset, data_root, index_file)
    if indices and not index:
        raise UserError("--indices: needs the data (--data-root DIR) or a class index (--class-index FILE)")
    train, test = index.get("train"), index.get("test")
    steps = []
    for step in p.steps:
        chosen = p.train_images(step.index, train.presence) if train else None
        listed = chosen if indices else None
        steps.append(
            ShownStep(
                step.index,
                {c: p.dataset.classes[c] for c in step.classes},
                None if chosen is None else len(chosen),
                len(p.test_images(step.index, test.presence)) if test else None,
                listed,
                [train.names[i] for i in listed] if train and listed is not None else None,
            )
        )
    return ShownProtocol(p.name, p.title, p.dataset.name, p.setting, p.order, steps)


def _indexes(dataset: Dataset, data_root: str | None, index_file: str | None) -> dict[str, ClassIndex]:
    if index_file:
        return {"train": read_class_index(Path(index_file), dataset)}
    if not data_root and not dataset.generator:
        try:
            locate(dataset)
        except UserError:
            return {}
    return class_indexes(dataset, data_root)


def protocol_text(shown: ShownProtocol) -> str:
    """A protocol for people."""
    rows = [
        [
            step.step,
            len(step.classes),
            "?" if step.train_images is None else step.train_images,
            "?" if step.test_images is None else step.test_images,
            ", ".join(f"{c} {name}" for c, name in step.classes.items()),
        ]
        for step in shown.steps
    ]
    what = f"data set {shown.data_set}, {shown.setting}, {len(shown.steps)} steps"
    table = tabulate(
        rows,
        headers=["step", "classes", "train images", "test images", "learned (background 0 is always there)"],
        tablefmt="plain",
        maxcolwidths=[None, None, None, None, WIDTH],
    )
    lines = [f"{shown.name} ({shown.title}): {what}", table]
    if shown.steps[0].train_images is None:
        lines.append("image counts: say where the data is with --data-root DIR, or give --class-index FILE")
    for step in shown.steps:
        if step.train_indices is not None:
            lines.append(f"step {step.step}: " + " ".join(map(str, step.train_indices)))
    return "\n".join(lines)


# ---- a method ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShownSetting:
    """A hyper-parameter: its value and source, what it is, and of what it is ("method" or "training")."""

    name: str
    value: JsonValue
    source: str
    what: str
    of: str


@dataclass(frozen=True)
class ShownMethod:
    """A method with its resolved recipe."""

    name: str
    title: str
    paper: str
    what: str
    file: str
    version: list[int]
    first_step: str
    protocol: str
    track: str
    notes: list[str]
    settings: list[ShownSetting]


def show_method(
    name: str, protocol: str, track: str | None = None, overrides: list[str] | None = None
) -> ShownMethod:
    """A method with every value and where it comes from."""
    from bench.method.registry import method
    from bench.method.resolve import overrides_for, parse_overrides, resolve
    from bench.plan.make import footnotes_of

    spec, p = method(name), load(protocol)
    used = track or p.dataset.track
    recipe = resolve(spec, p, used, overrides_for(spec, parse_overrides(overrides or []), [spec]))
    own = spec.own_settings()
    values = recipe.config.model_dump(mode="json")
    settings = [
        ShownSetting(
            key,
            values[key],
            recipe.sources[key],
            " ".join((info.description or "").split()),
            "method" if key in own else "training",
        )
        for key, info in spec.config.model_fields.items()
    ]
    settings.sort(key=lambda row: row.of != "method")
    return ShownMethod(
        name=spec.name,
        title=spec.title,
        paper=spec.cls.paper,
        what=" ".join((spec.cls.__doc__ or "").split()),
        file=spec.cls.__module__,
        version=spec.version,
        first_step=spec.first_step,
        protocol=p.name,
        track=used,
        notes=footnotes_of(spec, recipe, p),
        settings=settings,
    )


def method_text(shown: ShownMethod) -> str:
    """A method for people."""
    lines = [f"{shown.title} ({shown.name}): {shown.what}"]
    if shown.paper:
        lines.append(f"paper: {shown.paper}")
    own = shown.first_step == shown.name
    lines.append(f"step 0: {'its own' if own else 'that of ' + shown.first_step}")
    lines += [f"note: {note}" for note in shown.notes]
    lines.append(f"recipe on {shown.protocol}, track {shown.track}:")
    rows = [[row.name, _short(row.value), row.source, row.what] for row in shown.settings]
    table = tabulate(
        rows,
        headers=["setting", "value", "from", "what"],
        tablefmt="plain",
        disable_numparse=True,
        maxcolwidths=[None, None, None, WIDTH - 10],
    )
    return "\n".join([*lines, table])


def _short(value: JsonValue) -> str:
    return "-" if value is None else '""' if value == "" else str(value)
