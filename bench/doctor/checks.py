"""What a machine has for runs: room, locks, data, weights, a scheduler."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.data.cores import cores
from bench.data.dataset import DATASETS, Dataset
from bench.data.locate import locate
from bench.doctor.finding import Finding, State, gib
from bench.doctor.packages import python
from bench.errors import UserError
from bench.launch.local import default_slots, memory_bytes, visible_gpus
from bench.launch.queue import QueueError, queue
from bench.method.recipe import Recipe
from bench.method.registry import METHODS
from bench.protocol.file import PROTOCOLS
from bench.store import locks
from bench.store.results import Store

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 2**30
"""Loaders hand batches over through it; containers often have 64 MiB."""
DISK_BYTES = 20 * 2**30
"""About 40 checkpoints of a ResNet-101."""


def surroundings(data_root: str | Path | None, results: str | Path | None) -> Iterator[Finding]:
    """Everything but the packages and what they say of GPUs."""
    yield _machine()
    yield _shared_memory()
    yield from _results(Store(results).root)
    yield _plug_ins()
    yield from _data(data_root)
    yield from _weights()
    yield _scheduler()


# ---- this machine ------------------------------------------------------------------


def _machine() -> Finding:
    memory = memory_bytes()
    room = f", {gib(memory)} of memory" if memory else ""
    slots = default_slots(visible_gpus())
    return Finding("machine", "ok", f"{cores()} cores{room}; --cluster local runs {slots} jobs at once")


def _shared_memory() -> Finding:
    what = str(SHARED_MEMORY)
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return Finding(what, "note", "not there", "loading with several processes may fail on this machine")
    if free < SHARED_MEMORY_BYTES:
        cure = "give the container more (docker run --shm-size=8g), or runs end with a bus error"
        return Finding(what, "note", f"{gib(free)} free", cure)
    return Finding(what, "ok", f"{gib(free)} free")


def _results(root: Path) -> Iterator[Finding]:
    """Whether the results folder, or where it would be made, takes files and locks."""
    what, place = "results", next(path for path in (root, *root.resolve().parents) if path.exists())
    if not place.is_dir():
        yield Finding(what, "fail", f"{place} is a file", "name a folder with --results DIR")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            yield _locks(Path(folder))
    except OSError as error:
        cure = "name another folder with --results DIR"
        yield Finding(what, "fail", f"{place}: cannot be written ({error.strerror})", cure)
        return
    free = shutil.disk_usage(place).free
    state: State = "ok" if free >= DISK_BYTES else "note"
    cure = "" if state == "ok" else "a step of a ResNet-101 keeps about 0.5 GiB; make room"
    there = root if root == place else f"{root} (made when first used)"
    yield Finding(what, state, f"{there}: {gib(free)} free", cure)


def _locks(folder: Path) -> Finding:
    """Whether one process sees what another locks."""
    lock = folder / "lock"
    code = "import sys; from pathlib import Path; from bench.store.locks import is_held; "
    asked = ["-c", code + "sys.exit(not is_held(Path(sys.argv[1])))", str(lock)]
    with locks.hold(lock):
        unseen = python(asked).returncode
    if unseen:
        cure = "do not start the same run twice at once, or keep results on another file system"
        return Finding("locks", "note", f"{folder.parent}: its file system has none", cure)
    return Finding("locks", "ok", "one process sees what another holds")


def _plug_ins() -> Finding:
    methods, broken = METHODS.everything()
    protocols, more = PROTOCOLS.everything()
    says = f"{len(methods)} methods, {len(protocols)} protocols"
    if broken or more:
        return Finding("names", "note", f"{says}; cannot be loaded: {' | '.join([*broken, *more])}")
    return Finding("names", "ok", says)


# ---- data and weights ------------------------------------------------------------------------------------


def _data(data_root: str | Path | None) -> Iterator[Finding]:
    """Each data set, where it is; one that can be drawn is drawn when a run first needs it."""
    found = 0
    for name, dataset in DATASETS.everything()[0].items():
        if dataset.generator:
            yield Finding(f"data {name}", "ok", "drawn when first used")
            continue
        finding = _data_set(name, dataset, data_root)
        found += finding.state != "note"
        if finding.state != "note" or not data_root:
            yield finding
    if data_root and not found:
        cure = "without --data-root, `bench doctor` says which files each of them is looked for by"
        yield Finding("data", "fail", f"--data-root {data_root}: none of the data sets is there", cure)


def _data_set(name: str, dataset: Dataset, data_root: str | Path | None) -> Finding:
    what = f"data {name}"
    try:
        files = locate(dataset, data_root)
    except UserError as error:
        says, _, cure = str(error).partition("; say where")
        return Finding(what, "note", says.partition(": ")[2] or says, "say where" + cure if cure else "")
    lacking = [
        path
        for of in files.values()
        for path in (of.image(of.names[0]), of.mask(of.names[0]))
        if not path.is_file()
    ]
    root, counts = files["train"].root, {split: len(of.names) for split, of in files.items()}
    says = f"{root}: {counts['train']} training and {counts['test']} test images"
    if lacking:
        return Finding(what, "fail", f"{says} in its lists, but {lacking[0]} is not there", "unpack it whole")
    return Finding(what, "ok", says)


def _weights() -> Iterator[Finding]:
    """Each weights file that a recipe names."""
    wanted: dict[str, list[str]] = {}
    for name, found in METHODS.everything()[0].items():
        for weights in sorted(set(_named_weights(found.recipe))):
            wanted.setdefault(weights, []).append(name)
    for weights, methods in wanted.items():
        what, by = "weights", f"{weights} (for {', '.join(methods)})"
        if weights == "imagenet":
            yield _torchvision(by)
            continue
        at = next((p for p in (Path(weights), Path("pretrained") / weights) if p.is_file()), None)
        if at:
            yield Finding(what, "ok", f"{by}: {at}, {gib(at.stat().st_size)}")
        else:
            cure = "put it there, or what names it trains from scratch and every table says so"
            yield Finding(what, "note", f"{by}: neither here nor in ./pretrained", cure)


def _named_weights(recipe: Recipe) -> Iterator[str]:
    tables = [recipe.tables, *recipe.variants.values(), *recipe.around.values()]
    for table in (scoped for group in tables for scoped in group.values()):
        for values in (table.values, *table.scopes.values()):
            if values.get("pretrained"):
                yield str(values["pretrained"])


def _torchvision(by: str) -> Finding:
    """torchvision's weights are fetched when first used, and kept in a folder that a node may share."""
    home = Path(os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch")
    folder = (home / "hub" / "checkpoints").expanduser()
    names = sorted(path.name for path in folder.glob("*.pth")) if folder.is_dir() else []
    if names:
        return Finding("weights", "ok", f"{by}: {folder} has {', '.join(names)}")
    cure = "torchvision fetches them when first used; on a node without network copy them there first"
    return Finding("weights", "note", f"{by}: nothing in {folder} yet", cure)


# ---- the scheduler -----------------------------------------------------------------------------------------


def _scheduler() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("scheduler", "ok", "no SLURM on this machine; runs go to --cluster local or inline")
    try:
        jobs = queue()
    except QueueError as error:
        cure = "log in to a submit node, or use --cluster local"
        return Finding("scheduler", "note", f"SLURM is installed and does not answer: {error}", cure)
    return Finding("scheduler", "ok", f"SLURM answers; {len(jobs)} jobs of yours in its queue")
