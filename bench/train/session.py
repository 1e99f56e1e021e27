"""The one way to open a job: data, network, teacher and method put together, for training, tests, pictures
and benchmarks alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from bench import distributed, provenance
from bench.data.index import class_indexes
from bench.data.loader import default_workers
from bench.data.locate import locate
from bench.errors import UserError
from bench.method.interface import Method
from bench.method.registry import method
from bench.method.regulariser import with_records
from bench.method.step_data import StepData
from bench.plan.plan import SMOKE_ITERATIONS
from bench.score.counts import Counts
from bench.seeds import mix
from bench.store.records import Code, JobRecord
from bench.store.results import Store
from bench.train.assembly import MODULES, assemble, assemble_finished, fill, finished, modules_state
from bench.train.evaluate import evaluate
from bench.train.journal import Journal
from bench.train.selection import BestOnTest
from bench.train.stop import Stop
from bench.train.tensors import (
    joined_optimiser,
    read_tensors,
    scoped,
    split_optimiser,
    split_state,
    unscoped,
    write_tensors,
)
from bench.train.trainer import BEGINNING, Place, Trainer

CHECKPOINT = "checkpoint.safetensors"


def device_of_this_process() -> torch.device:
    """The GPU of this process, else the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def prepare_process(device: torch.device, threads: int) -> None:
    """Threads and determinism of this process: on a CPU a job's bits follow from its record alone."""
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu":
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        # Nothing reads memory before writing it, so there is no need to fill it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no stub


class Session:
    """A job, open. Close it, or use it as a context manager: it owns its data's loaders.

    Attributes:
        record: what is to be done.
        store: the results folder; previous steps are read from it.
        data: what the step may see.
        method: the method, with network, teacher, data and state.
        trainer: the optimisation loop.
        best: the selection of an iterate on test images, or None.
        journal: progress and losses.
        pretrained: where the body's weights came from, in words; "" after step 0.
        code: the code that the job began with; a resumed one's is that of its first attempt.
    """

    def __init__(
        self, record: JobRecord, store: Store, data: StepData, method: Method, trainer: Trainer
    ) -> None:
        self.record, self.store, self.data, self.method, self.trainer = record, store, data, method, trainer
        self.folder = store.work(record.key)
        self.journal = Journal(store, record.key)
        self.best: BestOnTest | None = None
        self.pretrained = ""
        self.code = installed_code(record)  # now: a file may be edited while the job runs
        trainer.on_iteration, trainer.on_checkpoint = self.journal.iteration, self.save
        trainer.checkpoint_seconds = 60 * method.config.checkpoint_minutes
        data.prepare = trainer.batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the loaders' processes."""
        self.data.close()

    # ---- the work ------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Begin the step, or go on from its checkpoint; train every phase; leave what the next step needs."""
        if self.method.selection() == "best-on-test":
            self.best = BestOnTest(self.trainer, self.data)
        with Stop() as self.trainer.stop:
            self._train_phases(*self.resume_or_begin())
        if self.best:
            self.best.restore()
        self.method.end_step()
        self.journal.flush()

    def _train_phases(
        self, place: Place, optimiser: Mapping[str, Any] | None, go_on: Callable[[], None]
    ) -> None:
        """All phases, or what `resume_or_begin` says is left of them."""
        self.method.setup()
        phases = self.method.phases()
        for index, current in enumerate(phases):
            if self.data.smoke:  # its few iterations are an epoch, and one is enough
                few = (
                    None
                    if current.length.iterations is None
                    else min(current.length.iterations, self.data.smoke)
                )
                current.length = current.length._replace(epochs=min(current.length.epochs, 1), iterations=few)
            if self.best and index == len(phases) - 1:  # what earlier phases leave is no candidate
                self.trainer.after_iteration = self.best.after_iteration
            if index == place.phase:
                self.trainer.run(index, current, place, optimiser, go_on)
            elif index > place.phase:
                self.trainer.run(index, current)

    def test(self, split: str = "test") -> Counts:
        """Confusion counts of each test image under the network as it stands."""
        return evaluate(
            self.trainer,
            self.data,
            split=split,
            progress=lambda done, total: self.journal.say("testing", done, total),
        )

    def begin(self) -> None:
        """The step begins: the newest head's initialisation, thresholds, memory."""
        torch.manual_seed(mix(self.record.inputs.seed, "start", self.record.step))
        if self.record.step:
            self.method.init_classifier()
        self.method.start_step()
        self.journal.rewind(0)

    def resume_or_begin(self) -> tuple[Place, dict[str, Any] | None, Callable[[], None]]:
        """Where training stands, the optimiser's state, and what sets random generators to where they stood:
        from the checkpoint if there is one, else the step begins."""
        path = self.folder / CHECKPOINT
        try:
            tensors, values = read_tensors(path) if path.exists() else ({}, None)
        except UserError as error:
            print(f"WARNING: {error}; the step begins anew", flush=True)
            values = None
        if values is not None and "place" not in values:
            print("the checkpoint was written by an earlier version; the step begins anew", flush=True)
            values = None
        if values is not None and values["records"] != sorted(wanted_records(self.record)):
            print("the checkpoint was recorded for other methods; the step begins anew", flush=True)
            values = None
        if values is None:
            self.begin()
            return BEGINNING, None, lambda: None
        fill(self.method.network, unscoped("network", tensors), path)
        for name, module in self.method.modules.items():
            fill(module, unscoped(f"{MODULES}.{name}", tensors), path)
        device = self.trainer.device
        self.method.state.update({name: t.to(device) for name, t in unscoped("state", tensors).items()})
        self.method.state.update(values["state"])
        self.trainer.scaler.load_state_dict(values["scaler"])
        if self.best:
            self.best.load(values["best"], unscoped("best", tensors))
        self.journal.rewind(values["log"])
        self.code = Code.model_validate(values["code"])
        place = Place(*values["place"])
        within = f" and {place.batches} batches" if place.batches else ""
        print(
            f"resuming {self.record.key}: phase {place.phase}, {place.epochs} epochs{within} done", flush=True
        )
        optimiser = joined_optimiser(values["optimiser"], unscoped("optimiser", tensors))
        mine = min(distributed.rank(), len(values["generators"]) - 1)
        states, generators = unscoped(f"random.{mine}", tensors), values["generators"][mine]
        return place, optimiser, functools.partial(self._go_on, states, generators)

    def _go_on(self, states: Mapping[str, Tensor], generators: Mapping[str, Any]) -> None:
        """Set torch's random generators, and the method's own, to where they stood."""
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
        for name, (version, numbers, gauss) in generators.items():
            self.method.generators[name].setstate((version, tuple(numbers), gauss))

    def save(self, place: Place) -> None:
        """Save all that the rest of the step depends on: each process says where its random generators stand,
        the first writes."""
        drawn = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            drawn["cuda"] = torch.cuda.get_rng_state()
        own = {name: one.getstate() for name, one in self.method.generators.items()}
        everyone = distributed.gathered((drawn, own))
        if distributed.rank():
            return
        assert self.trainer.optimiser is not None
        self.journal.flush()
        optimiser, momenta = split_optimiser(self.trainer.optimiser.state_dict())
        tensors, state = split_state(self.method.state)
        write_tensors(
            self.folder / CHECKPOINT,
            {
                **scoped("network", self.method.network.state_dict()),
                **modules_state(self.method),
                **scoped("state", tensors),
                **scoped("optimiser", momenta),
                **scoped("best", self.best.weights if self.best else {}),
                **{
                    f"random.{n}.{on}": t
                    for n, (states, _) in enumerate(everyone)
                    for on, t in states.items()
                },
            },
            {
                "place": place,
                "generators": [generators for _, generators in everyone],
                "optimiser": optimiser,
                "scaler": self.trainer.scaler.state_dict(),
                "state": state,
                "best": self.best.score if self.best else None,
                "log": self.journal.lines,
                "records": sorted(wanted_records(self.record)),
                "code": self.code.model_dump(mode="json"),
            },
        )


# ---- opening -----------------------------------------------------------------------------------------------


def open_job(record: JobRecord, store: Store, data: StepData | None = None) -> Session:
    """Open a job: its data, its network with what the previous step left, its teacher, its method. Nothing
    has begun yet.

    Args:
        record: a job to train, or an evaluation of a finished one.
        store: the results folder.
        data: instead of the files of the data set (bench.testing makes such data from tensors).

    Raises:
        UserError: data that changed since it was planned with, or a previous step that is not there or does
            not fit.
    """
    evaluated = None if record.inputs.kind == "train" else finished(record, store)
    trained = evaluated or record
    spec = method(trained.method)
    config = spec.config(**trained.settings).at(record.step)
    if record.inputs.evaluation and record.inputs.evaluation.crop:
        config = config.model_copy(update={"crop": record.inputs.evaluation.crop})
    device = device_of_this_process()
    prepare_process(device, config.threads)
    built = spec.build(config)
    records = wanted_records(record) if evaluated is None else {}
    if records:
        built = with_records(built, wanted_recorders(record), records)
    data = data or load_data(record, config, spec.cls.maps(config), device)
    built.step, built.data = data.step, data
    if spec.cls.knows_later:
        built.later = data.protocol.groups[record.step + 1 :]
    trainer = Trainer(built, record.inputs.seed, device, config.precision)
    session = Session(record, store, data, built, trainer)
    torch.manual_seed(mix(record.inputs.seed, "network", record.step))
    if evaluated is None:
        session.pretrained = assemble(built, trainer, record, store)
    else:
        assemble_finished(built, trainer, store.artifact(evaluated.key))
    return session


def load_data(record: JobRecord, config: Any, maps: tuple[str, ...], device: torch.device) -> StepData:
    """Images of a step, of earlier ones, and the test images; the same files as when the job was planned."""
    protocol, root = record.protocol, record.data_root
    files = locate(protocol.dataset, root)
    index = class_indexes(protocol.dataset, root)
    for split, found in index.items():
        if found.fingerprint != getattr(record.inputs.data, split):
            what = f"data set {protocol.dataset.name!r} ({split}) is not the one that was planned with"
            raise UserError(f"{what}; run bench run again")
    on_gpu, world = device.type == "cuda", distributed.world_size()
    return StepData(
        protocol,
        protocol.step(record.step),
        files,
        index,
        config,
        record.inputs.seed,
        distributed.rank(),
        world,
        default_workers(on_gpu, world),
        pin=on_gpu,
        smoke=SMOKE_ITERATIONS if record.inputs.smoke else None,
        maps=maps,
    )


# ---- state -------------------------------------------------------------------------------------------------


def wanted_records(record: JobRecord) -> dict[str, dict[str, Any]]:
    """What a job's training records, for itself and for the siblings that it yields: settings by recorder.

    Who asks for more comes first, so that recorders keep the order in which they are updated.
    """
    asking = sorted((record, *record.also), key=lambda r: -len(r.inputs.records))
    return {name: dict(settings) for r in asking for name, settings in r.inputs.records.items()}


def wanted_recorders(record: JobRecord) -> dict[str, str]:
    """ "module:class" of each recorder."""
    return {name: place for r in (record, *record.also) for name, place in r.recorders.items()}


def installed_code(record: JobRecord) -> Code:
    """The code that a job runs: of its method, of what it records for itself and its siblings, the engine."""
    files = {
        file: one
        for module in method(record.method).modules
        for file, one in provenance.files(module).items()
    }
    recorders = {
        name: provenance.files(place.partition(":")[0]) for name, place in wanted_recorders(record).items()
    }
    return Code(method=files, recorders=recorders, engine=provenance.engine())
