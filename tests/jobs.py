"""Jobs trained in this process, whole or until they are interrupted, and the files that they leave."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.data.index import class_indexes
from bench.files import read_json
from bench.method.replay import Record, kept
from bench.plan.plan import Plan
from bench.protocol.file import load
from bench.store.records import Metrics, read_record
from bench.store.results import Store
from bench.train.job import publish
from bench.train.session import Session, open_job
from bench.train.trainer import Place

EXACT = ("model.safetensors", "state.safetensors", "metrics.json", "train.jsonl")
"""Files of an artifact that follow from the job alone, byte by byte."""


def dies_after(epochs: int, session: Session) -> None:
    """Let the process of a job die once it has saved the end of so many epochs, counted over all phases."""
    save, ended = session.trainer.on_checkpoint, itertools.count(1)
    session.trainer.checkpoint_seconds = 0

    def on_checkpoint(place: Place) -> None:
        if not place.batches:
            save(place)
            if next(ended) == epochs:
                raise KeyboardInterrupt

    session.trainer.on_checkpoint = on_checkpoint


def dies_within(iterations: int, session: Session) -> None:
    """Let the process of a job die after so many iterations, the last of them saved."""
    save, ended = session.trainer.on_checkpoint, itertools.count(1)
    session.trainer.checkpoint_seconds = 0

    def on_checkpoint(place: Place) -> None:
        if next(ended) == iterations:
            save(place)
            raise KeyboardInterrupt

    session.trainer.on_checkpoint = on_checkpoint


def train(
    plan: Plan,
    store: Store,
    key: str,
    also: Sequence[str] = (),
    watch: Callable[[Session], None] = lambda _: None,
) -> Session:
    """One job of a plan from its record to its artifact, or on from its checkpoint.

    Args:
        plan, store, key: the job, and where it leaves its artifact.
        also: siblings that the same training yields.
        watch: sees the session before it begins.

    Returns:
        The session, closed.
    """
    store.make()
    store.open_work(plan.record(key, also))
    with open_job(store.record(key), store) as session:
        watch(session)
        session.train()
        publish(session, session.test())
    store.clear_work(key)
    return session


def train_all(plan: Plan, store: Store, watch: Callable[[Session], None] = lambda _: None) -> Session:
    """Every job of a plan that is not done; `watch` sees the last one, which is returned."""
    left = [key for key in plan.jobs if not store.done(key)]
    for key in left[:-1]:
        train(plan, store, key)
    return train(plan, store, left[-1], watch=watch)


def interrupted(epochs: int) -> Callable[[Session], None]:
    """For `watch`: the job's process dies after so many epochs."""
    return functools.partial(dies_after, epochs)


def files(store: Store, plan: Plan, names: Sequence[str] = EXACT) -> dict[str, bytes]:
    """Content of files by "<key>/<name>", of every job of a plan."""
    return {f"{key}/{name}": (store.artifact(key) / name).read_bytes() for key in plan.jobs for name in names}


def images_of(path: Path) -> list[list[str]]:
    """Names of the training images of each step of a protocol."""
    protocol = load(path)
    index = class_indexes(protocol.dataset)["train"]
    chosen = [protocol.train_images(t, index.presence) for t in range(len(protocol.groups))]
    return [[index.names[i] for i in positions] for positions in chosen]


def records_of(folder: Path) -> list[Record]:
    """The exemplars that an artifact's state hands on."""
    state: Any = read_json(folder / "state.json")
    return kept(state)


def memory_of(folder: Path) -> list[str]:
    """The exemplars that an artifact says are kept."""
    metrics = read_record(folder / Metrics.file, Metrics)
    assert metrics is not None
    return metrics.memory
