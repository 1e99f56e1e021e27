"""`bench list`: every name that a command, a file or a method can use, whoever brings it."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from tabulate import tabulate

from bench.commands import options
from bench.errors import UserError
from bench.names import Registry

EXAMPLES = """examples:
  bench list protocols
  bench list methods"""

Row = dict[str, str | int]
T = TypeVar("T")


class Listed(NamedTuple):
    """Rows of a table, and one line for each thing that cannot be loaded."""

    rows: list[Row]
    warnings: list[str]


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("what", choices=list(KINDS), metavar="|".join(KINDS), help="what is listed")
    options.add_results_option(parser)
    options.add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the names of a kind; what cannot be loaded is a warning."""
    found = KINDS[args.what]()
    if args.what == "methods":
        _add_changes(found.rows, args.results)
    print(json.dumps(found.rows, indent=1) if args.json else table(found.rows))
    for warning in found.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    return 0


def table(rows: Sequence[Mapping[str, str | int]]) -> str:
    """The rows as text; a column that says nothing is left out."""
    shown = [{k: v for k, v in row.items() if any(other.get(k) for other in rows)} for row in rows]
    return tabulate(shown, headers="keys", tablefmt="plain")


# ---- one function a kind -----------------------------------------------------------------------------------


def _listed(registry: Registry[T], row: Callable[[T], Row]) -> Listed:
    things, warnings = registry.everything()
    return Listed([{"name": name, **row(thing)} for name, thing in things.items()], warnings)


def _protocols() -> Listed:
    from bench.protocol.file import PROTOCOLS

    return _listed(
        PROTOCOLS,
        lambda p: {
            "data set": p.dataset.name,
            "steps": len(p.groups),
            "classes": "+".join(_runs([len(group) for group in p.groups])),
            "title": p.title,
        },
    )


def _runs(sizes: Sequence[int]) -> list[str]:
    """[15, 1, 1, 1] as ["15", "3x1"]."""
    out: list[list[int]] = []
    for size in sizes:
        if out and out[-1][1] == size:
            out[-1][0] += 1
        else:
            out.append([1, size])
    return [str(size) if n == 1 else f"{n}x{size}" for n, size in out]


def _methods() -> Listed:
    from bench.data.dataset import DATASETS
    from bench.method.registry import METHODS, MethodSpec, method
    from bench.method.resolve import published_on

    things, warnings = METHODS.everything()
    rows: list[Row] = []
    for name, found in things.items():
        cls = found.cls
        spec = MethodSpec(name, cls, cls, (found.recipe,))
        try:
            if not cls.wraps:
                method(name)
            known = [scope for scope in published_on(spec) if scope in DATASETS]
        except UserError as error:
            warnings.append(str(error))
            continue
        rows.append(
            {
                "name": f"{name}+METHOD" if cls.wraps else name,
                "title": cls.title,
                "published recipes": ", ".join(known) or "-",
                "variants": ", ".join(f"@{variant}" for variant in sorted(found.recipe.variants)) or "-",
                "paper": cls.paper or "-",
                "notes": "; ".join(cls.caveats),
            }
        )
    return Listed(rows, warnings)


def _add_changes(rows: Sequence[Row], results: str | None) -> None:
    """Say of each method how many of its finished jobs ran other code than is installed."""
    from bench.store.changes import changes, listed
    from bench.store.records import JobRecord, read_record
    from bench.store.results import Store

    store = Store(results)
    found: dict[str, list[tuple[str, ...]]] = {}
    for key, changed in changes(store, store.keys()).items():
        if not changed.files:
            continue
        try:
            job = read_record(store.artifact(key) / JobRecord.file, JobRecord)
        except UserError:  # damaged; reports name it
            continue
        for part in job.method.split("+") if job else ():
            found.setdefault(part.partition("@")[0], []).append(changed.files)
    for row in rows:
        jobs = found.get(str(row["name"]).partition("+")[0])
        if jobs:
            files = listed(sorted({file for one in jobs for file in one}))
            row["changed"] = f"{files} since {len(jobs)} of its jobs ran"


def _datasets() -> Listed:
    from bench.data.dataset import DATASETS

    return _listed(DATASETS, lambda d: {"classes": len(d.classes) - 1, "track": d.track, "title": d.title})


def _networks() -> Listed:
    from bench.models.build import NETWORKS

    _import_methods()
    return _listed(NETWORKS, lambda network: {"what": network.says})


def _bodies() -> Listed:
    from bench.models.build import BODIES

    _import_methods()
    return _listed(BODIES, lambda body: {"what": body.says})


def _classifiers() -> Listed:
    from bench.models.build import CLASSIFIERS

    _import_methods()
    return _listed(CLASSIFIERS, lambda classifier: {"what": classifier.says})


def _import_methods() -> None:
    """A method's file may bring networks, label rules or augmentations of its own."""
    from bench.method.registry import METHODS

    METHODS.everything()


def _tracks() -> Listed:
    from bench.method.recipe import TRACKS

    return _listed(TRACKS, lambda track: {"what": track.says})


def _conventions() -> Listed:
    from bench.score.conventions import CONVENTIONS

    return _listed(CONVENTIONS, lambda convention: {"what": convention.says})


def _profiles() -> Listed:
    from bench.launch.profile import PROFILES

    return _listed(
        PROFILES,
        lambda p: {
            "gpus": str(p.gpus),
            "cpus": p.cpus,
            "mem_gb": f"{p.mem_gb:g}",
            "minutes": p.time_min,
            "partition": p.partition,
        },
    )


def _settings() -> Listed:
    from bench.protocol.images import SETTINGS

    return _listed(SETTINGS, lambda setting: {"what": setting.says})


def _label_rules() -> Listed:
    from bench.protocol.labels import RULES

    _import_methods()
    return _listed(
        RULES,
        lambda rule: {
            "training: background, old, future, void": _view(rule.train),
            "test: the same": _view(rule.test),
            "note": rule.note,
        },
    )


def _view(view: Sequence[int]) -> str:
    """What becomes of the four kinds of pixel."""
    from bench.data.dataset import IGNORE

    return ", ".join({IGNORE: "ignored", 0: "background"}.get(value, "kept") for value in view)


def _augmentations() -> Listed:
    from bench.data.augment import AUGMENTATIONS

    _import_methods()
    return _listed(
        AUGMENTATIONS, lambda augment: {"what": (inspect.getdoc(augment) or "").partition("\n")[0]}
    )


KINDS: Mapping[str, Callable[[], Listed]] = {
    "protocols": _protocols,
    "methods": _methods,
    "datasets": _datasets,
    "networks": _networks,
    "tracks": _tracks,
    "conventions": _conventions,
    "profiles": _profiles,
    "settings": _settings,
    "label-rules": _label_rules,
    "augmentations": _augmentations,
    "bodies": _bodies,
    "classifiers": _classifiers,
}
