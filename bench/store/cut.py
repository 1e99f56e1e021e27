"""A job's artifact cut out of a sibling's: the same training, recorded for more than this job asks for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bench.errors import UserError
from bench.files import read_json, write_json
from bench.store.records import Environment, JobRecord, Metrics, read_record, write_record
from bench.store.results import Store

SAME = ("model.safetensors", "confusion.npz", "train.jsonl")
"""Files that do not depend on what is recorded."""
STATE = "state.safetensors"


def cut(store: Store, source: str, record: JobRecord) -> None:
    """Publish a job's artifact from that of a finished sibling. Nothing is trained.

    Args:
        store: the results folder.
        source: key of the sibling, whose records hold all of this job's.
        record: the job.

    Raises:
        UserError: the sibling's artifact is not whole, or not of the same training.
    """
    folder = store.artifact(source)
    metrics, told = store.metrics(source), read_record(folder / JobRecord.file, JobRecord)
    if metrics is None or told is None:
        raise UserError(f"{folder}: not a whole artifact; train it again with --force")
    other = told.inputs.records
    if told.inputs.model_copy(update={"records": {}}) != record.inputs.model_copy(update={"records": {}}):
        raise UserError(f"{folder}: not the same training as {record.key}; train it again with --force")
    if any(other.get(name) != settings for name, settings in record.inputs.records.items()):
        raise UserError(f"{folder}: was not recorded for {record.key}; train it again with --force")
    foreign = frozenset(other) - frozenset(record.inputs.records)

    def write(target: Path) -> None:
        for name in SAME:
            if (folder / name).is_file():
                _share(folder / name, target / name)
        if (folder / STATE).is_file():
            _cut_state(folder, target, foreign)
        ran = read_record(folder / Environment.file, Environment)
        if ran is not None:
            code = ran.code.recording(record.inputs.records)
            write_record(target / Environment.file, ran.model_copy(update={"code": code}))
        write_record(target / JobRecord.file, record.model_copy(update={"also": []}))
        write_record(target / Metrics.file, metrics.model_copy(update={"key": record.key}))

    with store.lock(record.key):
        store.publish(record.key, write)
        store.clear_work(record.key)


def _share(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _cut_state(folder: Path, target: Path, foreign: frozenset[str]) -> None:
    """The state without what foreign recorders left, whose names begin with theirs and a dot."""
    try:
        with safe_open(folder / STATE, framework="np") as file:
            values = json.loads((file.metadata() or {}).get("values", "null"))
            kept = [name for name in file.offset_keys() if not _is_of(name, foreign)]
            tensors = {name: file.get_tensor(name) for name in kept}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder / STATE}: cut off or damaged ({error}); train it again with --force"
        ) from None
    save_file(tensors, target / STATE, metadata={"values": json.dumps(_kept(values, foreign))})
    write_json(target / "state.json", _kept(read_json(folder / "state.json"), foreign))


def _kept(values: JsonValue, foreign: frozenset[str]) -> JsonValue:
    if not isinstance(values, Mapping):
        return values
    return {name: value for name, value in values.items() if not _is_of(name, foreign)}


def _is_of(name: str, recorders: frozenset[str]) -> bool:
    return name.partition(".")[0] in recorders
