"""A job's process: from its record to its artifact folder.

A job is found by its key in the results folder, does its work, and leaves either a whole artifact or a
failure that names the cause. Interrupted, it goes on from its last checkpoint and, on the CPU, ends with the
same bits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from bench import __version__, distributed, provenance
from bench.errors import TrainingError, UserError
from bench.files import write_json
from bench.score.conventions import CONVENTIONS, Convention
from bench.score.counts import Counts, write_counts
from bench.score.iou import old_new_all, score
from bench.store.records import Environment, JobRecord, Metrics, Score, write_record
from bench.store.results import Store
from bench.train.assembly import modules_state
from bench.train.session import Session, open_job
from bench.train.tensors import split_state, write_tensors

DRIVER_FILE = "/proc/driver/nvidia/version"
DRIVER_SECONDS = 20.0


def run_job(results: str, key: str, log: str = "") -> None:
    """Entry point of a job's process.

    Args:
        results: the results folder.
        key: the job.
        log: where this process writes its output; named in the failure.

    Raises:
        whatever stopped the job, after it is written down: the process must end with a non-zero status.
    """
    store = Store(results)
    distributed.start()
    first = distributed.rank() == 0
    with store.lock(key) if first else contextlib.nullcontext():
        if first:
            store.clear_failure(key)
        distributed.barrier()  # the others begin once the first has the lock
        if store.done(key) and not (store.work(key) / JobRecord.file).is_file():
            return  # another process finished it meanwhile
        try:
            do(store.record(key), store)
        except (UserError, TrainingError) as error:
            store.report_failure(key, str(error), log)
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise
        except Exception as error:
            store.report_failure(key, f"{type(error).__name__}: {error}", log)
            traceback.print_exc()
            raise
        if first:
            store.clear_work(key)


def do(record: JobRecord, store: Store) -> None:
    """Train (or open what was trained), test, publish."""
    with open_job(record, store) as session:
        session.journal.say("starting")
        if record.inputs.kind == "train":
            session.train()
        evaluation = record.inputs.evaluation
        counts = session.test(evaluation.split if evaluation else "test")
        if distributed.rank() == 0:
            publish(session, counts)
        distributed.barrier()


def publish(session: Session, counts: Counts) -> None:
    """The artifacts of a session: its siblings' first, its own last."""
    for record in session.record.also:
        with session.store.lock(record.key):
            session.store.publish(record.key, functools.partial(_write_artifact, session, record, counts))
    session.store.publish(
        session.record.key, functools.partial(_write_artifact, session, session.record, counts)
    )


def _write_artifact(session: Session, record: JobRecord, counts: Counts, folder: Path) -> None:
    """Fill an artifact folder; metrics.json last."""
    built, data = session.method, session.data
    if record.inputs.kind == "train":
        write_tensors(folder / "model.safetensors", built.network.state_dict())
        tensors, values = split_state(built.state)
        foreign = {name for other in (session.record, *session.record.also) for name in other.inputs.records}
        foreign -= set(record.inputs.records)
        tensors = {name: t for name, t in tensors.items() if name.partition(".")[0] not in foreign}
        values = {name: v for name, v in values.items() if name.partition(".")[0] not in foreign}
        write_tensors(folder / "state.safetensors", {**tensors, **modules_state(built)}, values)
        write_json(folder / "state.json", values)
        shutil.copyfile(session.journal.path, folder / "train.jsonl")
    write_counts(folder / "confusion.npz", counts)
    write_record(folder / Environment.file, environment(session, record))
    write_record(folder / JobRecord.file, record.model_copy(update={"also": []}))
    step, dataset = data.step, data.protocol.dataset
    scores = {
        name: scored(counts, how, session)
        for name, how in ((name, CONVENTIONS.find(name)) for name in CONVENTIONS.known())
    }
    metrics = Metrics(
        key=record.key,
        classes=[dataset.classes[c] for c in step.seen],
        images=len(counts.images),
        scores=scores,
        memory=built.memory(),
    )
    write_record(folder / Metrics.file, metrics)


def scored(counts: Counts, how: Convention, session: Session) -> Score:
    """What a convention says of some counts."""
    protocol, step = session.data.protocol, session.data.step
    iou = score(counts, how, protocol.dataset, step)
    means = old_new_all(iou, protocol.step(0).n_classes, how)
    return Score(
        **{name: _number(value) for name, value in means.items()}, iou=[_number(value) for value in iou]
    )


def _number(value: float) -> float | None:
    """For JSON: NaN as null."""
    return None if np.isnan(value) else float(value)


def environment(session: Session, record: JobRecord) -> Environment:
    """On what the job ran: versions, machine, threads, and the code, for one of the session's artifacts."""
    packages: dict[str, str | None] = {"ciss-bench": __version__}
    for name in ("torch", "torchvision", "inplace-abn", "numpy", "pillow"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    device = session.trainer.device
    on_gpu = device.type == "cuda"
    return Environment(
        packages=packages,
        python=platform.python_version(),
        machine=platform.machine(),
        host=platform.node(),
        device=device.type,
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        driver=_driver() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        processes=distributed.world_size(),
        threads=torch.get_num_threads(),
        code=session.code.recording(record.inputs.records),
        commit=provenance.commit(),
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        pretrained=session.pretrained,
        seconds=round(time.time() - session.journal.started, 1),
    )


def _driver() -> str | None:
    """Version of the GPU's driver; None if this machine does not tell."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", Path(DRIVER_FILE).read_text("utf-8"))
        if found:
            return found[1]
    except (OSError, UnicodeDecodeError):
        pass  # in a container the file may be missing
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DRIVER_SECONDS)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return asked.stdout.strip().partition("\n")[0] or None if asked.returncode == 0 else None
