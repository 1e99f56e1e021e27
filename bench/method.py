"""The Method interface: the hooks of a method, and their defaults = plain fine-tuning.

A method is one class in one file. Every hook has a default, and the defaults together are plain fine-tuning. The engine calls
the hooks in this order and knows no method by name:

    heads            how many channels each head of the classifier has
    init_classifier  once, when a later step begins: how the classifier's newest head starts
    start_step       once, when a step begins: thresholds, memory, importances; may change the weights
    setup            each time a process takes the step up, fresh or resumed: freeze, build what is not saved
    phases           what is trained, in which order; one phase unless the method says otherwise
      batches        an epoch's batches
      train_mode     before each epoch
      losses         one batch -> {"ce": …, "kd": …}; the engine sums them, logs each, and calls backward
      observe        after that backward pass: gradients are there, averaged over processes, not yet used
      penalties      more terms, with a backward pass of their own that `observe` does not see
    predict          logits -> classes
    end_step         what the next step needs, left in `state`

Planning reads every method file, on login nodes without torch too: write `from bench.lazy import F, torch`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bench.losses import cross_entropy
from bench.recipe import Settings
from bench.schedule import learning_rate

if TYPE_CHECKING:
    from torch import Tensor

    from bench.data.loader import StepData
    from bench.models.network import Network
    from bench.protocol import Protocol, Step
    from bench.train import Batch


class Batches(typing.Protocol):
    """An epoch's batches, whose number is known."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...


State = MutableMapping[str, Any]
"""What a method keeps: tensors and JSON values by name. Saved with every checkpoint and handed to the next step."""


@dataclass
class Phase:
    """A stretch of training with an optimiser and a schedule of its own.

    Attributes:
        name: shown in progress and logs.
        epochs: passes over the step's batches.
        groups: SGD parameter groups; each has "params", "lr" and may have "weight_decay".
        losses: one batch -> named loss terms.
        rate: (learning rate of the group, iteration, iterations) -> learning rate of this update.
        on_end: called when the phase is over.
    """

    name: str
    epochs: int
    groups: list[dict[str, Any]]
    losses: Callable[[Batch], dict[str, Tensor]]
    rate: Callable[[float, int, int], float]
    on_end: Callable[[], None] = lambda: None


class Method:
    """Fine-tuning, and the base of every method.

    Class attributes say what the planner and the reader of a table must know; the engine sets the instance attributes before
    it calls any hook.

    Attributes:
        config: the hyper-parameters.
        step: the step being learned.
        network: the network being trained; its classifier already has this step's heads.
        teacher: the frozen network of the previous step in evaluation mode (None at step 0).
        data: images of this and earlier steps.
        previous: the state that the previous step left (empty at step 0).
        state: what this method keeps; saved with each checkpoint and handed to the next step.
    """

    title: ClassVar[str] = ""
    """As tables print it."""
    paper: ClassVar[str] = ""
    """Authors, venue and year."""
    version: ClassVar[int] = 1
    """Raised when a change of the code changes results: it is part of every job's key."""
    first_step: ClassVar[str] = ""
    """The method whose step 0 this one builds on; "" for its own."""
    at_once: ClassVar[bool] = False
    """Learns all classes in one step."""
    classifier: ClassVar[str] = "linear"
    """Kind of classifier: a name of bench.models.build.CLASSIFIERS."""
    wraps: ClassVar[bool] = False
    """Is written around another method, as in nest+mib."""
    validations: int = 100
    """How often a step is validated under selection = "best-on-test"."""
    caveats: ClassVar[tuple[str, ...]] = ()
    """What a fair comparison must not hide; footnotes of every table."""

    class Config(Settings):
        """Hyper-parameters."""

    config: Any
    step: Step
    network: Network
    teacher: Network | None
    data: StepData
    previous: Mapping[str, Any]
    state: State

    def __init__(self, config: Any) -> None:
        self.config = config
        self.teacher = None
        self.previous = {}
        self.state = {}

    def attach(self, step: Step, network: Network, teacher: Network | None, data: StepData, previous: Mapping[str, Any]) -> None:
        """Called by the engine before any other hook of a step."""
        self.step, self.network, self.teacher, self.data, self.previous = step, network, teacher, data, previous

    # ---- before training -----------------------------------------------------------------------------------------------

    def heads(self, sizes: Sequence[int]) -> list[int]:
        """Channels of each classifier head, given the classes of each step (the first count includes background)."""
        return list(sizes)

    def init_classifier(self) -> None:
        """Once, when a step after the first begins, before `start_step`: initialise the newest head."""

    def start_step(self) -> None:
        """Once, when a step begins."""

    def needs_saliency(self) -> bool:
        """Whether training samples must carry saliency maps under these hyper-parameters."""
        return False

    def setup(self) -> None:
        """Each time a process takes the step up, fresh or resumed."""

    # ---- training ------------------------------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        """What is trained, in which order."""
        values = self.config.at(self.step.index)
        return [Phase("training", values["epochs"], self.parameter_groups(), self.losses, self.rate)]

    def rate(self, base: float, iteration: int, total: int) -> float:
        """Learning rate of one update of the main phase."""
        c = self.config
        return learning_rate(base, iteration, total, c.schedule, c.power, c.min_lr, int(c.warmup * total))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """SGD groups of the main phase: everything that requires a gradient, the body at `body_lr` times the learning rate."""
        values = self.config.at(self.step.index)
        body = {id(p) for p in self.network.body.parameters()}
        trained = [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) in body], "lr": values["lr"] * values["body_lr"]},
            {"params": [p for p in trained if id(p) not in body], "lr": values["lr"]},
        ]
        return [group for group in groups if group["params"]]

    def batches(self, epoch: int) -> Batches:
        """An epoch's batches, as the loader makes them: "images" uint8 [B, H, W, 3], "labels" uint8 [B, H, W], and more."""
        return self.data.loader(self.data.train, epoch)

    def train_mode(self) -> None:
        """Put the network into training mode; called before each epoch."""
        self.network.train()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted loss terms of one batch; the engine sums them."""
        return {"ce": cross_entropy(batch.output.logits, batch.labels)}

    def observe(self) -> None:
        """After the backward pass of `losses`: gradients are final for this batch, and no parameter has moved yet."""

    def penalties(self) -> dict[str, Tensor]:
        """Loss terms with a backward pass of their own, invisible to `observe`."""
        return {}

    # ---- after training ------------------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """Leave in `state` what the next step needs."""

    def predict(self, logits: Tensor) -> Tensor:
        """Classes [B, H, W] of logits [B, C, H, W]; 0 is background, k the k-th class of the protocol's order."""
        return logits.argmax(dim=1)

    def memory(self) -> list[str]:
        """Names of the exemplars kept for later steps; each record counts, so a name can stand twice."""
        return []

    # ---- for the plan and for reading ----------------------------------------------------------------------------------

    @classmethod
    def iterations(cls, config: Any, index: int, images: int) -> int:
        """How many step `index` takes, in all phases together, if it has this many images of its own."""
        values = config.at(index)
        return images // values["batch_size"] * values["epochs"]

    @classmethod
    def check(cls, config: Any, protocol: Protocol) -> None:
        """Raise UserError when a run is planned for what these hyper-parameters cannot do on this protocol."""

    @classmethod
    def footnotes(cls, config: Any) -> list[str]:
        """Caveats under these hyper-parameters."""
        return list(cls.caveats)


class Wrapper(Method):
    """A method around another, as in nest+mib: every hook is the wrapped method's until a subclass overrides it.

    Both see the same network, teacher, data and state, and read one Config that has the fields of both. `phases` are those of the
    wrapped method, so it is its losses, rate and parameter groups that they use.

    Attributes:
        base: the wrapped method.
    """

    wraps = True

    def __init__(self, config: Any, base: Method) -> None:
        super().__init__(config)
        self.base = base
        base.state = self.state
        self.validations = base.validations

    def attach(self, step: Step, network: Network, teacher: Network | None, data: StepData, previous: Mapping[str, Any]) -> None:
        super().attach(step, network, teacher, data, previous)
        self.base.attach(step, network, teacher, data, previous)

    def heads(self, sizes: Sequence[int]) -> list[int]:
        return self.base.heads(sizes)

    def init_classifier(self) -> None:
        self.base.init_classifier()

    def start_step(self) -> None:
        self.base.start_step()

    def needs_saliency(self) -> bool:
        return self.base.needs_saliency()

    def setup(self) -> None:
        self.base.setup()

    def phases(self) -> list[Phase]:
        return self.base.phases()

    def rate(self, base: float, iteration: int, total: int) -> float:
        return self.base.rate(base, iteration, total)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.base.parameter_groups()

    def batches(self, epoch: int) -> Batches:
        return self.base.batches(epoch)

    def train_mode(self) -> None:
        self.base.train_mode()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return self.base.losses(batch)

    def observe(self) -> None:
        self.base.observe()

    def penalties(self) -> dict[str, Tensor]:
        return self.base.penalties()

    def end_step(self) -> None:
        self.base.end_step()

    def predict(self, logits: Tensor) -> Tensor:
        return self.base.predict(logits)

    def memory(self) -> list[str]:
        return self.base.memory()
