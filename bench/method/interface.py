"""The Method interface: the hooks of a method, and their defaults = plain fine-tuning."""

from __future__ import annotations

import copy
import random
import typing
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from bench.lazy import torch
from bench.method.losses import cross_entropy
from bench.method.schedule import Group, Rate, groups, scheduled
from bench.method.settings import Settings
from bench.protocol.protocol import Protocol, Step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bench.method.batch import Batch
    from bench.method.step_data import StepData

EXEMPLARS = "exemplars"
"""Under this name a method's state holds the records of its memory (bench.method.replay)."""


class Batches(typing.Protocol):
    """An epoch's batches, whose number is known."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...


LEAST_INTERVAL = 100
"""Iterations between two validations are never fewer, unless a method says otherwise."""

State = MutableMapping[str, Any]
"""What a method keeps: tensors and JSON values by name. Saved with every checkpoint and handed to the next
step."""


class Length(NamedTuple):
    """How long a phase is: `epochs` passes over `images` images, or that many `iterations` whatever the
    images."""

    epochs: int
    images: int
    iterations: int | None = None

    def count(self, batch_size: int) -> int:
        """Iterations in all."""
        return self.images // batch_size * self.epochs if self.iterations is None else self.iterations


@dataclass
class Phase:
    """A stretch of training with an optimiser and a schedule of its own.

    Attributes:
        name: shown in progress and logs.
        length: how long it is, as `Method.lengths` says.
        groups: parameter groups; each has "params", "lr", and may have "weight_decay" and what else the
            optimiser knows.
        losses: one batch -> named loss terms.
        rate: (learning rate of the group, iteration, iterations) -> learning rate of this update.
        optimiser: groups -> optimiser, any of torch's; its whole state is saved with every checkpoint.
        clip: gradients are scaled down to this norm, over all parameters together; None: they are not.
        on_end: called when the phase is over.
    """

    name: str
    length: Length
    groups: list[Group]
    losses: Callable[[Batch], dict[str, Tensor]]
    rate: Rate
    optimiser: Callable[[list[Group]], torch.optim.Optimizer]
    clip: float | None = None
    on_end: Callable[[], None] = lambda: None


class Method:
    """Fine-tuning, and the base of every method: one class in one file. The engine knows no method by name.

    What the engine does with a method, as code:

        if step.index == 0:
            method.network = method.build_network(sizes)
        else:                                                        # the old network, as it was left
            method.network = method.build_network(sizes[:-1])
            method.previous = what_the_previous_step_left
            method.teacher = method.make_teacher(method.network)     # frozen; where `needs_teacher`
            method.grow_network(method.network, sizes)               # the new heads
        method.modules = method.own_modules()
        if fresh:                                                    # not resumed from a checkpoint
            if step.index:
                method.init_classifier()
            method.start_step()
        method.setup()
        for phase in method.phases():
            optimiser = phase.optimiser(phase.groups)
            for epoch in range(phase.length.epochs):
                method.train_mode()
                for batch in method.batches(epoch):
                    optimiser.zero_grad()
                    sum(phase.losses(batch).values()).backward()     # every term is logged under its name
                    method.observe()
                    sum(method.penalties().values()).backward()
                    optimiser.step()                                 # at the rate of phase.rate
            phase.on_end()
        method.end_step()
        for batch in test_images:
            classes = method.predict(method.network(batch.images), size)

    Planning reads every method file, on login nodes without torch too: write `from bench.lazy import F,
    torch`.

    Attributes:
        config: the hyper-parameters in force at this step: what `first_x` says at step 0 stands in x.
        step: the step being learned.
        later: classes of each later step, if the method `knows_later`, else empty.
        network: the network being trained; its classifier already has this step's heads.
        teacher: the frozen network of the previous step in evaluation mode; None at step 0, or if none is
            needed.
        data: images of this and earlier steps.
        previous: the state that the previous step left (empty at step 0).
        state: what this method keeps; saved with each checkpoint and handed to the next step.
        modules: its own modules by name.
        generators: its own random generators by name: where they stand is in every checkpoint. (So is where
            torch's own stand.)
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
    knows_later: ClassVar[bool] = False
    """May know at each step which classes later steps add; then they are in the key."""
    needs_teacher: ClassVar[bool] = True
    """Whether a frozen copy of the previous step's network is kept in memory."""
    classifier: ClassVar[str] = "linear"
    """Kind of classifier: a name of bench.models.build.CLASSIFIERS."""
    wraps: ClassVar[tuple[str, ...]] = ()
    """For a method written around another, as in nest+mib: the kinds of classifier it works on. Its class
    comes before the wrapped one's, so `super()` is the wrapped method."""
    validations: ClassVar[int] = 100
    """How often a step is validated under selection = "best-on-test"."""
    recorders: ClassVar[tuple[type[Any], ...]] = ()
    """What it needs recorded while steps train (bench.method.regulariser), in the order in which they are
    updated."""
    caveats: ClassVar[tuple[str, ...]] = ()
    """What a fair comparison must not hide; footnotes of every table."""

    class Config(Settings):
        """Hyper-parameters."""

    config: Any
    step: Step
    later: tuple[tuple[int, ...], ...]
    network: Any
    teacher: Any
    data: StepData
    previous: Mapping[str, Any]
    state: State
    modules: Mapping[str, nn.Module]
    generators: dict[str, random.Random]

    def __init__(self, config: Any) -> None:
        self.config = config
        self.later = ()
        self.teacher = None
        self.previous = {}
        self.state = {}
        self.modules = {}
        self.generators = {}

    # ---- the network ---------------------------------------------------------------------------------------

    def heads(self, sizes: Sequence[int]) -> list[int]:
        """Channels of each classifier head, given the classes of each step (the first count includes
        background)."""
        return list(sizes)

    def build_network(self, sizes: Sequence[int]) -> Any:
        """A fresh network for steps of these sizes (the first includes background), on the CPU."""
        from bench.models.build import build_network

        return build_network(self.config.network, self.heads(sizes), self.classifier, self.config.norm)

    def grow_network(self, network: Any, sizes: Sequence[int]) -> None:
        """Add to a network of the steps before the last of `sizes` what the last one needs."""
        for size in self.heads(sizes)[len(self.heads(sizes[:-1])) :]:
            network.classifier.grow(size)

    def make_teacher(self, network: Any) -> Any:
        """The frozen network of the previous step, from that step's network as it was left."""
        return copy.deepcopy(network).eval().requires_grad_(False)

    def own_modules(self) -> dict[str, nn.Module]:
        """Modules beside the network: saved with each checkpoint, handed on in `previous` as
        "modules.<name>.<tensor>", synchronised as the network is. Their parameters are trained if a phase has
        them in a group."""
        return {}

    # ---- before training -----------------------------------------------------------------------------------

    def init_classifier(self) -> None:
        """Once, when a step after the first begins, before `start_step`: initialise the newest head."""

    def start_step(self) -> None:
        """Once, when a step begins: thresholds, memory, importances; may change the weights."""

    def setup(self) -> None:
        """Each time a process takes the step up, fresh or resumed: freeze, build what is not saved."""

    # ---- training ------------------------------------------------------------------------------------------

    @classmethod
    def lengths(cls, config: Any, index: int, images: int) -> dict[str, Length]:
        """How long each phase of step `index` is: read by the plan, which has no network, and by `phases`.

        Args:
            config: the hyper-parameters in force at the step.
            index: of the step.
            images: its own training images.
        """
        return {"training": Length(config.epochs, images)}

    def length(self, phase: str) -> Length:
        """How long a phase of this step is."""
        return self.lengths(self.config, self.step.index, len(self.data.train))[phase]

    def phases(self) -> list[Phase]:
        """What is trained, in which order; one phase unless the method says otherwise."""
        rate = scheduled(self.config)
        return [
            Phase(
                "training",
                self.length("training"),
                self.parameter_groups(),
                self.losses,
                rate,
                self.optimiser,
            )
        ]

    def parameter_groups(self) -> list[Group]:
        """Groups of the main phase: everything that requires a gradient, the body at `body_lr` times the
        learning rate."""
        return groups(self.network, self.config.lr, {"body": self.config.body_lr})

    def optimiser(self, groups: list[Group]) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum over some groups, fresh."""
        c = self.config
        with_decay = [{"weight_decay": c.weight_decay, **group} for group in groups]
        return torch.optim.SGD(with_decay, lr=c.lr, momentum=c.momentum, nesterov=c.momentum > 0)

    def batches(self, epoch: int) -> Batches:
        """An epoch's batches, as the loader makes them: "images" uint8 [B, H, W, 3], "labels" uint8 [B, H,
        W], more."""
        return self.data.loader(self.data.train, epoch)

    def train_mode(self) -> None:
        """Put the network into training mode; called before each epoch, and after each validation."""
        self.network.train()
        for module in self.modules.values():
            module.train()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted loss terms of one batch by name; the engine logs each and sums them."""
        return {"ce": cross_entropy(batch.output.logits, batch.labels)}

    def observe(self) -> None:
        """After the backward pass of `losses`: gradients are final for this batch, and no parameter has moved
        yet."""

    def penalties(self) -> dict[str, Tensor]:
        """Loss terms with a backward pass of their own, invisible to `observe`."""
        return {}

    # ---- after training ------------------------------------------------------------------------------------

    def selection(self) -> str:
        """Which iterate this step hands on: "last" or "best-on-test"."""
        return str(self.config.selection)

    def validation_interval(self, total: int) -> int:
        """Iterations between two validations under selection = "best-on-test", of `total` in the phase."""
        return max(LEAST_INTERVAL, total // self.validations)

    def end_step(self) -> None:
        """Leave in `state` what the next step needs; may change the weights, which are saved, tested and
        handed on after it."""

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        """Classes of what the network puts out; 0 is background, k the k-th class of the protocol's order.

        Args:
            output: of the network.
            size: (H, W) of the labels.

        Returns:
            int64 [B, H, W].
        """
        classes: Tensor = output.logits.argmax(dim=1)
        return classes

    def memory(self) -> list[str]:
        """Names of the exemplars kept for later steps, sorted; each record counts, so a name can stand
        twice."""
        return sorted(str(record[0]) for record in self.state.get(EXEMPLARS, []))

    # ---- for the plan and for reading ----------------------------------------------------------------------

    @classmethod
    def maps(cls, config: Any) -> tuple[str, ...]:
        """Named maps that training samples must carry beside image and labels, for example "saliency"."""
        return ()

    @classmethod
    def records(cls, config: Any) -> dict[str, dict[str, Any]]:
        """What must be recorded while the step 0 that this method builds on trains: settings by the
        recorder's name."""
        return {}

    @classmethod
    def check(cls, config: Any, protocol: Protocol) -> None:
        """Raise UserError when a run is planned for what these hyper-parameters cannot do on this
        protocol."""

    @classmethod
    def footnotes(cls, config: Any) -> list[str]:
        """Caveats under these hyper-parameters."""
        return list(cls.caveats)
