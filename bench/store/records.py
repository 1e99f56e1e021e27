"""What stands on disk, typed and versioned: the only reader and writer of job.json, chain.json, metrics.json
and their kind.

A record is self-contained: what it says of data sets, classes and settings is in it, never only in a file of
one machine. Each carries the number of its schema; a later version of the harness reads older ones, through
`UPGRADES`, and refuses newer ones by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from bench.errors import UserError
from bench.files import read_json, write_json
from bench.protocol.protocol import Protocol

SCHEMA = 2
"""Of every record. 1 was that of version 0.1.0's untyped files."""
KEY_FORMAT = 2
"""Of the keys: raised when the engine changes what a job with the same inputs yields."""


class Record(BaseModel):
    """A file of the results folder. What a reader does not know is dropped: a later version may have added
    it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    file: ClassVar[str] = ""
    """The file's name, where it has only one."""


R = TypeVar("R", bound=Record)
UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""By schema: from a record's content to that of the next schema."""


def write_record(path: Path, record: Record) -> None:
    """Write a record, whole."""
    write_json(path, {"schema": SCHEMA, **record.model_dump(mode="json")})


def read_record(path: Path, kind: type[R]) -> R | None:
    """A record; None if it is not there.

    Raises:
        UserError: damaged, or of a later version.
    """
    content = read_json(path)
    return None if content is None else parse_record(content, kind, str(path))


def parse_record(content: JsonValue, kind: type[R], where: str) -> R:
    """Some JSON as a record; `where` names the file in errors."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: damaged: not a record; delete it and run again")
    schema = content.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(
            f"{where}: schema {schema}: written by a later version of ciss-bench; this one reads up to "
            f"{SCHEMA}"
        )
    while schema < SCHEMA:
        if schema not in UPGRADES:
            raise UserError(
                f"{where}: schema {schema}: written by an earlier version of ciss-bench, which this one does "
                "not read; keep it, and name another folder with --results DIR"
            )
        content, schema = UPGRADES[schema](content), schema + 1
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where}: damaged: {place}: {first['msg']}; delete {Path(where).parent} and run again"
        ) from None


# ---- jobs --------------------------------------------------------------------------------------------------


class DataInputs(Record):
    """The data that a job sees: fingerprints of its files and of what maps masks to classes."""

    set: str
    train: str
    test: str
    maps: dict[str, str] = {}
    """Digest of each named map that the method reads; empty is neutral."""


class MethodInputs(Record):
    """The method that trains a step, and those of its own hyper-parameters that play a part in it."""

    name: str
    version: list[int]
    settings: dict[str, JsonValue]


class EvaluationInputs(Record):
    """What an evaluation looks at, instead of what training ends with."""

    split: Literal["test", "train"] = "test"
    crop: int | None = None
    """Side of the scored central square in pixels; None: that of the training."""


class Inputs(Record):
    """Everything that decides a job's outcome; its key is a digest of it.

    Later versions add fields with neutral values, which leave the keys of what went before alone (`NEUTRAL`).
    """

    NEUTRAL: ClassVar[Mapping[str, JsonValue]] = {"later": [], "records": {}, "evaluation": None}
    """Values under which a field is left out of the key."""

    format: int
    kind: Literal["train", "evaluate"]
    data: DataInputs
    classes: list[list[int]]
    """Data set ids of each step so far, without background."""
    later: list[list[int]] = []
    """The same of the steps to come, for a method that knows them."""
    images: str
    """Digest of the list of the step's training images."""
    method: MethodInputs
    training: dict[str, JsonValue]
    """The settings that every method has."""
    records: dict[str, dict[str, JsonValue]] = {}
    """What is recorded while the step trains, for later methods."""
    smoke: bool
    evaluation: EvaluationInputs | None = None
    seed: int
    parent: str | None
    """Key of the job before this one: the previous step's, or for an evaluation the evaluated step's."""


class JobRecord(Record):
    """job.json: a job as its process reads it, and as its artifact tells it for good."""

    file: ClassVar[str] = "job.json"

    key: str
    inputs: Inputs
    step: int
    method: str
    """As the registry takes it; for a shared step 0 the method that owns it."""
    settings: dict[str, JsonValue]
    """All values of that method's Config."""
    protocol: Protocol
    """With its data set, whole."""
    images: int
    """Training images of the step."""
    data_root: str | None = None
    """Where the data was found when the job was planned."""
    places: list[str] = []
    """Where results link to it, relative to the results folder."""
    recorders: dict[str, str] = {}
    """"module:class" of each recorder of `inputs.records`."""
    also: list[JobRecord] = []
    """Jobs that the same training yields: they differ in what is recorded alone."""


class Score(Record):
    """Means and IoU of each seen class under one convention, in [0, 1]; null where the convention leaves
    something out."""

    old: float | None = None
    new: float | None = None
    all: float | None = None
    iou: list[float | None]


class Metrics(Record):
    """metrics.json: what a job's test says, under every convention."""

    file: ClassVar[str] = "metrics.json"

    key: str
    classes: list[str]
    """Names of the seen classes in channel order, background first."""
    images: int
    """Test images."""
    scores: dict[str, Score]
    memory: list[str] = []
    """Exemplars kept after this step; each record counts."""


class Code(Record):
    """The code that a job ran, as `bench.provenance` tells it when the job begins: digests by file."""

    method: dict[str, str] = {}
    """Of the method's files, and of what they import."""
    recorders: dict[str, dict[str, str]] = {}
    """The same of each recorder of `Inputs.records`."""
    engine: dict[str, str] = {}
    """Of each part of bench/ that decides numbers."""

    def files(self) -> dict[str, str]:
        """Those of the method and of every recorder."""
        return {name: one for part in (*self.recorders.values(), self.method) for name, one in part.items()}

    def recording(self, names: Iterable[str]) -> Code:
        """With these recorders alone."""
        kept = {name: self.recorders[name] for name in sorted(names) if name in self.recorders}
        return self.model_copy(update={"recorders": kept})


class Environment(Record):
    """environment.json: on what a job ran, and with which code. Nothing of it is in the job's key."""

    file: ClassVar[str] = "environment.json"

    packages: dict[str, str | None] = {}
    python: str = ""
    machine: str = ""
    host: str = ""
    device: str = ""
    """"cpu" or "cuda"; "" in older records, see `device_kind`."""
    gpu: str | None = None
    """Its name."""
    driver: str | None = None
    """Version of the GPU's driver."""
    cuda: str | None = None
    """Version of CUDA that torch was built with."""
    processes: int = 1
    threads: int = 1
    code: Code = Code()
    commit: str | None = None
    """Of the harness' own repository, if it ran from that."""
    finished: str = ""
    pretrained: str = ""
    seconds: float = 0.0

    @property
    def device_kind(self) -> str:
        """ "cpu" or "cuda", "" if it is not known."""
        return self.device or ("cuda" if self.gpu else "cpu" if self.machine else "")

    @property
    def torch(self) -> str:
        """Version of torch, without the build's local part; "" if it is not known."""
        return (self.packages.get("torch") or "").partition("+")[0]


# ---- work under way ----------------------------------------------------------------------------------------


class Progress(Record):
    """progress.json: what a job's process last said."""

    file: ClassVar[str] = "progress.json"

    host: str
    pid: int
    updated: float
    started: float = 0.0
    phase: str = "starting"
    epoch: int = 0
    epochs: int = 0
    iteration: int = 0
    iterations: int = 0
    loss: float | None = None
    eta: float | None = None
    """Seconds left of this phase."""


class Failure(Record):
    """failure.json: why a job's last attempt stopped."""

    file: ClassVar[str] = "failure.json"

    error: str
    log: str
    when: float


class Submission(Record):
    """submitted.json: to whom a job was handed."""

    file: ClassVar[str] = "submitted.json"

    host: str
    run: str
    cluster: str
    log: str = ""
    pid: int | None = None
    gpu: str | None = None
    id: str | None = None
    """Of the SLURM job."""


# ---- runs and rows -----------------------------------------------------------------------------------------


class RunChain(Record):
    """One chain of a run: keys of its steps, and where results link to them."""

    keys: list[str]
    places: list[str]


class RunRecord(Record):
    """runs/<name>.json: what a `bench run` asked for."""

    chains: list[RunChain]


class ChainRecord(Record):
    """chain.json: how a row of a table is to be read."""

    file: ClassVar[str] = "chain.json"

    protocol: Protocol
    track: str
    method: str
    title: str
    steps: int
    footnotes: list[str]
    network: str
    settings: dict[str, JsonValue]
    sources: dict[str, str]


class DataRecord(Record):
    """data.json: the data and class order that a folder of results belongs to."""

    file: ClassVar[str] = "data.json"

    fingerprint: str
    groups: list[list[int]]
    root: str | None = None
    data_set: str
