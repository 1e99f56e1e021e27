"""One job: from its inputs to its artifact folder.

A job is found by its key in the results folder, does its work, and leaves either a whole artifact or a failure that names the
cause. Interrupted, it goes on from its last finished epoch and, on the CPU, ends with the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import distributed, metrics
from bench.data.dataset import load_dataset, locate
from bench.data.index import class_indexes
from bench.data.loader import StepData, default_workers
from bench.errors import UserError
from bench.evaluate import evaluate
from bench.journal import Journal
from bench.models.build import build_network
from bench.models.network import Network
from bench.models.weights import load_pretrained
from bench.plan import SMOKE_ITERATIONS, content_key
from bench.protocol import Protocol
from bench.recipe import Settings
from bench.registry import method
from bench.seeds import mix
from bench.selection import BestOnTest
from bench.store import Store, read_json, write_json
from bench.tensors import read_tensors, scoped, split_state, unscoped, write_tensors
from bench.train import Trainer, TrainingError

CHECKPOINT = "checkpoint.safetensors"


def protocol_of(job: Mapping[str, Any]) -> Protocol:
    """The protocol as a job's record describes it."""
    p = job["protocol"]
    groups, partition = (tuple(tuple(group) for group in p[name]) for name in ("groups", "partition_groups"))
    return Protocol(p["name"], load_dataset(p["dataset"]), p["setting"], groups, "", partition)


def device_of_this_process() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class StepJob:
    """A job under way.

    Attributes:
        store, key, folder: where it lives.
        job: its record: what decides the outcome ("inputs"), the protocol, the settings, the data root.
        method: the method with network, teacher, data and state.
        trainer: the optimisation loop.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key, self.folder = store, key, store.work(key)
        self.job: dict[str, Any] = read_json(self.folder / "job.json")
        if self.job is None:
            raise UserError(f"{self.folder}: no job.json; jobs are submitted by bench run")
        self.inputs = self.job["inputs"]
        self.index = len(self.inputs["classes"]) - 1
        self.seed: int = self.inputs["seed"]
        self.device = device_of_this_process()
        self.journal = Journal(store, key)
        self.pretrained = ""

    def run(self) -> None:
        """Train, test, publish."""
        self.journal.say("starting")
        spec = method(self.job["method"])
        config = spec.config(**self.job["settings"])
        self.data = self.load_data(config)
        self.method = spec.build(config)
        self.data.saliency = self.method.needs_saliency()
        self.attach(spec.classifier)
        self.trainer = Trainer(self.method, self.seed, self.device, config.precision, self.journal.iteration, self.save)
        self.data.prepare = self.trainer.batch
        if config.selection == "best-on-test":
            self.best: BestOnTest | None = BestOnTest(self.trainer, self.data, self.method.validations)
        else:
            self.best = None
        phase, epochs, optimiser = self.resume_or_start()
        self.method.setup()
        phases = self.method.phases()
        for index, current in enumerate(phases):
            if self.data.smoke:  # its few iterations are an epoch, and one is enough
                current.epochs = min(current.epochs, 1)
            if self.best and index == len(phases) - 1:  # what earlier phases leave is no candidate
                self.trainer.after_iteration = self.best.after_iteration
            if index >= phase:
                resumed = index == phase and epochs > 0
                self.trainer.run(index, current, epochs if resumed else 0, optimiser if resumed else None)
        if self.best:
            self.best.restore()
        self.method.end_step()
        self.journal.flush()
        counts = evaluate(self.trainer, self.data, progress=lambda done, total: self.journal.say("testing", done, total))
        if distributed.rank() == 0:
            self.store.publish(self.key, lambda folder: self.write_artifact(folder, counts))
        distributed.barrier()

    # ---- the pieces ----------------------------------------------------------------------------------------------------

    def load_data(self, config: Settings) -> StepData:
        """Images of this step, of earlier ones, and the test images; the same files as when the run was planned."""
        protocol, root = protocol_of(self.job), self.job["data_root"]
        files = locate(protocol.dataset, root)
        index = class_indexes(protocol.dataset, root)
        for split, found in index.items():
            if found.fingerprint != self.inputs["data"][split]:
                raise UserError(f"data set {protocol.dataset.name!r} ({split}) is not the one that was planned with; run bench run again")
        on_gpu, world = self.device.type == "cuda", distributed.world_size()
        return StepData(
            protocol, protocol.step(self.index), files, index, config.at(self.index), self.seed, distributed.rank(), world,
            default_workers(on_gpu, world), pin=on_gpu, smoke=SMOKE_ITERATIONS if self.inputs["smoke"] else None,
        )  # fmt: skip

    def attach(self, classifier: str) -> None:
        """Give the method its network with this step's heads, its teacher, and what the previous step left."""
        step, values = self.data.step, self.data.values
        sizes = [self.data.protocol.step(t).n_new for t in range(self.index + 1)]
        heads = self.method.heads(sizes)
        torch.manual_seed(mix(self.seed, "network", self.index))
        if self.index == 0:
            network, teacher, previous = build_network(values["network"], heads, classifier, values["norm"]), None, {}
            self.pretrained = self.load_pretrained(network, values)
        else:
            old = self.method.heads(sizes[:-1])
            network = build_network(values["network"], old, classifier, values["norm"])
            previous = self.load_parent(network)
            teacher = copy.deepcopy(network).eval().requires_grad_(False)
            for size in heads[len(old) :]:
                network.classifier.grow(size)
        if distributed.world_size() > 1 and self.device.type == "cuda":  # plain batch norms; activated ones synchronise themselves
            network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        for n in (network, teacher):
            if n is not None:
                n.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.method.attach(step, network, teacher, self.data, previous)

    def load_pretrained(self, network: Network, values: Mapping[str, Any]) -> str:
        """Pretrained weights for the body at step 0, or a loud word that there are none."""
        if values["pretrained"]:
            return load_pretrained(network, values["network"], values["pretrained"])
        if not values["network"].startswith("small"):
            print(f'WARNING: {values["network"]} is trained from scratch: pretrained = ""', flush=True)
        return "none: trained from scratch"

    def load_parent(self, network: Network) -> dict[str, Any]:
        """The previous step's weights into `network`; returns the state it left."""
        parent = self.store.artifact(self.inputs["parent"])
        record = read_json(parent / "job.json")
        if record is None:
            raise UserError(f"{parent}: the previous step is not there; run bench run again")
        if content_key(record["inputs"]) != self.inputs["parent"] or record["inputs"]["classes"] != self.inputs["classes"][:-1]:
            raise UserError(f"{parent}: holds a step of another method, protocol or class order than its name says; run again with --force")
        weights, _ = read_tensors(parent / "model.safetensors")
        fill(network, weights, parent / "model.safetensors")
        tensors, values = read_tensors(parent / "state.safetensors")
        return {**{name: t.to(self.device) for name, t in tensors.items()}, **(values or {})}

    def resume_or_start(self) -> tuple[int, int, dict[str, Any] | None]:
        """(phase, epochs done in it, optimiser state): from the checkpoint if there is one, else the step begins."""
        path = self.folder / CHECKPOINT
        try:
            tensors, values = read_tensors(path) if path.exists() else ({}, None)
        except UserError as error:
            print(f"WARNING: {error}; the step begins anew", flush=True)
            values = None
        if values is None:
            torch.manual_seed(mix(self.seed, "start", self.index))
            if self.index:
                self.method.init_classifier()
            self.method.start_step()
            self.journal.rewind(0)
            return 0, 0, None
        fill(self.method.network, unscoped("network", tensors), path)
        self.method.state.update({name: t.to(self.device) for name, t in unscoped("state", tensors).items()})
        self.method.state.update(values["state"])
        momenta = {int(i): {"momentum_buffer": t.to(self.device)} for i, t in unscoped("optimiser", tensors).items()}
        self.trainer.scaler.load_state_dict(values["scaler"])
        if self.best:
            self.best.load(values["best"], unscoped("best", tensors), self.device)
        self.journal.rewind(values["log"])
        print(f"resuming {self.key}: phase {values['phase']}, {values['epochs']} epochs done", flush=True)
        return values["phase"], values["epochs"], {**values["optimiser"], "state": momenta}

    def save(self, phase: int, epochs: int) -> None:
        """Save all that the rest of the step depends on, after an epoch. Only the first process writes."""
        if distributed.rank():
            return
        assert self.trainer.optimiser is not None
        self.journal.flush()
        optimiser = self.trainer.optimiser.state_dict()
        momenta = {str(i): state["momentum_buffer"] for i, state in optimiser.pop("state").items()}
        tensors, state = split_state(self.method.state)
        write_tensors(
            self.folder / CHECKPOINT,
            {
                **scoped("network", self.method.network.state_dict()), **scoped("state", tensors), **scoped("optimiser", momenta),
                **scoped("best", self.best.weights if self.best else {}),
            },
            {
                "phase": phase, "epochs": epochs, "optimiser": optimiser, "scaler": self.trainer.scaler.state_dict(), "state": state,
                "best": self.best.state() if self.best else None, "log": self.journal.lines,
            },
        )  # fmt: skip

    def write_artifact(self, folder: Path, counts: metrics.Counts) -> None:
        """Fill the artifact folder; metrics.json last."""
        protocol, step = self.data.protocol, self.data.step
        write_tensors(folder / "model.safetensors", self.method.network.state_dict())
        tensors, values = split_state(self.method.state)
        write_tensors(folder / "state.safetensors", tensors, values)
        write_json(folder / "state.json", values)
        metrics.write_counts(folder / "confusion.npz", counts)
        shutil.copyfile(self.journal.path, folder / "train.jsonl")
        seconds = time.time() - self.journal.started
        write_json(folder / "environment.json", {**environment(self.device), "pretrained": self.pretrained, "seconds": round(seconds, 1)})
        write_json(folder / "job.json", self.job)
        scores: dict[str, Any] = {}
        for name, how in metrics.CONVENTIONS.items():
            iou = metrics.score(counts, how, protocol.dataset, step)
            means = metrics.old_new_all(iou, protocol.step(0).n_classes, how)
            scores[name] = {**{k: _number(v) for k, v in means.items()}, "iou": [_number(v) for v in iou]}
        write_json(
            folder / "metrics.json",
            {
                "key": self.key, "classes": [protocol.dataset.classes[c] for c in step.seen], "images": len(counts.images),
                "scores": scores, "memory": self.method.memory(),
            },
        )  # fmt: skip


def fill(network: Network, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a network that must fit them exactly."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        what = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: does not fit this network (another method, class count or network?): {what}") from None


def _number(value: float) -> float | None:
    """For JSON: NaN as null."""
    return None if np.isnan(value) else float(value)


def environment(device: torch.device) -> dict[str, Any]:
    """On what the job ran: versions, machine, threads, and the commit of the code."""
    packages: dict[str, str | None] = {}
    for name in ("ciss-bench", "torch", "torchvision", "inplace-abn", "numpy", "pillow"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "packages": packages, "python": platform.python_version(), "machine": platform.machine(), "host": platform.node(), "gpu": gpu,
        "processes": distributed.world_size(), "threads": torch.get_num_threads(), "commit": git.stdout.strip() or None,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def prepare_process() -> None:
    """Threads and determinism of this process."""
    if "BENCH_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    torch.backends.cudnn.benchmark = True
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads memory before writing it


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
    prepare_process()
    with store.lock(key) if distributed.rank() == 0 else contextlib.nullcontext():
        if distributed.rank() == 0:
            store.clear_failure(key)
        distributed.barrier()  # the others begin once the first has the lock
        if store.done(key) and not (store.work(key) / "job.json").is_file():
            return  # another process finished it meanwhile
        try:
            StepJob(store, key).run()
        except (UserError, TrainingError) as error:
            store.report_failure(key, str(error), log)
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise
        except Exception as error:
            store.report_failure(key, f"{type(error).__name__}: {error}", log)
            traceback.print_exc()
            raise
        if distributed.rank() == 0:
            store.clear_work(key)
