"""An open job: what a method may bring, and what the engine does with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import files, interrupted, train, train_all
from torch import Tensor, nn

from bench.data.dataset import IGNORE
from bench.errors import TrainingError
from bench.method import NETWORKS, Batch, Method
from bench.method.schedule import Group
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.store.results import Store
from bench.testing.plugins import Offers
from bench.train.session import Session, open_job
from bench.train.tensors import read_tensors
from bench.train.trainer import Place

Toy = Callable[..., Path]


def plan_of(toy: Toy, name: str, *more: str, **shape: Any) -> Plan:
    """Steps of two epochs on the throw-away benchmark, two classes each."""
    common = ["epochs=2", "first_epochs=2", "batch_size=4", "crop=32"]
    return make_plan([str(toy(**{"then": 2, **shape}))], [name], overrides=[*common, *more])


def opened(plan: Plan, store: Store, key: str) -> Session:
    """A job, open, before it begins."""
    store.make()
    store.open_work(plan.record(key))
    return open_job(store.record(key), store)


# ---- modules of its own ------------------------------------------------------------------------------------


class WithModules(Method):
    """Fine-tuning with a projection, trained beside the network, that each step takes over from the last."""

    def own_modules(self) -> dict[str, nn.Module]:
        return {"projection": nn.Sequential(nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 64, 1))}

    def start_step(self) -> None:
        prefix = "modules.projection."
        left = {k.removeprefix(prefix): v for k, v in self.previous.items() if k.startswith(prefix)}
        assert bool(left) == bool(self.step.index)
        if left:
            self.modules["projection"].load_state_dict(left)
        self.modes: list[bool] = []

    def parameter_groups(self) -> list[Group]:
        own: Group = {"params": list(self.modules["projection"].parameters()), "lr": self.config.lr}
        return [*super().parameter_groups(), own]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        projection = self.modules["projection"]
        assert projection.training
        features = batch.output.features
        return {**super().losses(batch), "own": (projection(features) - features.detach()).square().mean()}

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        assert not self.modules["projection"].training
        return super().predict(output, size)


def own_weights(store: Store, key: str) -> dict[str, Tensor]:
    left, _ = read_tensors(store.artifact(key) / "state.safetensors")
    return {k: v for k, v in left.items() if k.startswith("modules.projection.")}


def test_own_modules_are_trained_saved_and_handed_on(toy: Toy, offer: Offers) -> None:
    offer("moduled", WithModules)
    plan, store = plan_of(toy, "moduled"), Store("r")
    first, second = plan.jobs
    fresh = opened(plan, store, first)
    start = {k: v.clone() for k, v in fresh.method.modules["projection"].state_dict().items()}
    fresh.close()
    train_all(plan, store)
    one, two = own_weights(store, first), own_weights(store, second)
    assert set(one) == {f"modules.projection.{name}" for name in start}
    assert not torch.equal(one["modules.projection.0.weight"], start["0.weight"])
    assert one["modules.projection.1.num_batches_tracked"] == plan.jobs[first].iterations
    total = sum(job.iterations for job in plan.jobs.values())
    assert (
        two["modules.projection.1.num_batches_tracked"] == total
    )  # the second step went on with the first's


def test_own_modules_go_on_where_they_were_interrupted(toy: Toy, offer: Offers) -> None:
    offer("moduled", WithModules)
    plan, whole, broken = plan_of(toy, "moduled"), Store("whole"), Store("broken")
    train_all(plan, whole)
    with pytest.raises(KeyboardInterrupt):
        train_all(plan, broken, interrupted(1))
    train_all(plan, broken)
    assert files(whole, plan) == files(broken, plan)


# ---- teacher, selection, later classes ---------------------------------------------------------------------


class Alone(Method):
    """Fine-tuning that keeps no old network."""

    needs_teacher = False


@pytest.mark.parametrize("needed", [True, False])
def test_a_teacher_is_kept_only_where_one_is_needed(toy: Toy, offer: Offers, needed: bool) -> None:
    offer("alone", type("Alone", (Alone,), {"needs_teacher": needed}))
    plan, store = plan_of(toy, "alone"), Store("r")
    first, second = plan.jobs
    train(plan, store, first)
    with opened(plan, store, second) as session:
        images, labels = torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
        batch = session.trainer.batch({"images": images, "labels": labels})
        if not needed:
            assert session.method.teacher is None
            with pytest.raises(
                TrainingError, match="there is no teacher: this is step 0, or the method says"
            ):
                _ = batch.teacher
            return
        teacher = session.method.teacher
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        assert batch.teacher.logits.shape[1] == 3
        assert batch.output.logits.shape[1] == 5
        left, _ = read_tensors(store.artifact(first) / "model.safetensors")
        assert all(torch.equal(value, left[name]) for name, value in teacher.state_dict().items())


class SelectsFirst(Method):
    """Fine-tuning that hands on the best iterate of step 0, and the last one of later steps."""

    def selection(self) -> str:
        return "last" if self.step.index else "best-on-test"


def test_iterates_are_selected_by_step(toy: Toy, offer: Offers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.method.interface.LEAST_INTERVAL", 1)
    offer("chosen", SelectsFirst)
    plan, store = plan_of(toy, "chosen"), Store("r")
    first, second = plan.jobs
    best = train(plan, store, first).best
    assert best is not None
    assert best.score > 0
    left, _ = read_tensors(store.artifact(first) / "model.safetensors")
    assert all(torch.equal(value, left[name]) for name, value in best.weights.items())
    assert train(plan, store, second).best is None


class Knowing(Method):
    """Fine-tuning whose heads are all there at step 0."""

    knows_later = True

    def build_network(self, sizes: Sequence[int]) -> Any:
        own = [len(self.step.classes)] if len(sizes) == self.step.index else []  # else among `sizes`
        return super().build_network([*sizes, *own, *map(len, self.later)])

    def grow_network(self, network: Any, sizes: Sequence[int]) -> None:
        pass

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.output.logits.shape[1] == self.step.n_classes + sum(map(len, self.later)) == 5
        return super().losses(batch)

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        seen: Tensor = output.logits[:, : self.step.n_classes].argmax(1)
        return seen


def test_who_knows_later_classes_can_build_for_them_at_once(toy: Toy, offer: Offers) -> None:
    offer("knowing", Knowing)
    plan, store = plan_of(toy, "knowing", then=1), Store("r")
    seen = []
    for key in plan.jobs:
        train(plan, store, key, watch=lambda session: seen.append(session.method.later))
    assert seen == [((3,), (4,)), ((4,),), ()]
    shapes = [read_tensors(store.artifact(key) / "model.safetensors")[0] for key in plan.jobs]
    assert [{k: v.shape for k, v in shape.items()} for shape in shapes[1:]] == [
        {k: v.shape for k, v in shapes[0].items()}
    ] * 2
    common = ["epochs=2", "first_epochs=2", "batch_size=4", "crop=32"]
    offer("knowing", type("Unknowing", (Knowing,), {"knows_later": False}))
    other = make_plan(["toy-2-1.toml"], ["knowing"], overrides=common)
    assert not set(plan.jobs) & set(other.jobs)
    told = [store.metrics(key) for key in plan.jobs]
    assert [metrics.classes[1:] for metrics in told if metrics] == [
        ["c1", "c2"],
        ["c1", "c2", "c3"],
        ["c1", "c2", "c3", "c4"],
    ]
    with pytest.raises(AssertionError):  # it is not told, so it has no heads for them
        train(other, store, next(iter(other.jobs)))


# ---- a network of another make -----------------------------------------------------------------------------


class Masks(nn.Module):
    """A network whose output is a few masks, and how much each is which class; it knows no `Output`."""

    def __init__(self, sizes: Sequence[int], n: int = 6) -> None:
        super().__init__()
        self.pixels = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.queries = nn.Parameter(torch.randn(n, 16))
        self.classes = nn.ModuleList(nn.Linear(16, size) for size in sizes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(class scores [B, N, C], masks [B, N, h, w])."""
        masks = torch.einsum("bdhw,nd->bnhw", self.pixels(images), self.queries)
        scores = torch.cat([head(self.queries) for head in self.classes], dim=1)
        return scores.expand(len(images), -1, -1), masks


class MaskKind:
    """How such a network is named and built."""

    says = "masks, each with a class"
    weights = ""

    def carries(self, classifier: str) -> bool:
        return classifier == "classes of masks"

    def build(self, sizes: Sequence[int], classifier: str, norm: str) -> nn.Module:
        return Masks(sizes)


class MaskMethod(Method):
    """Fine-tuning of a mask network, told also which classes an image shows."""

    classifier = "classes of masks"

    def grow_network(self, network: Any, sizes: Sequence[int]) -> None:
        network.classes.append(nn.Linear(16, sizes[-1]))

    def semantic(self, output: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
        scores, masks = output
        large = nn.functional.interpolate(masks.sigmoid(), size=size, mode="bilinear")
        return torch.einsum("bnc,bnhw->bchw", scores.softmax(2), large)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        likely = self.semantic(batch.output, (batch.labels.shape[1], batch.labels.shape[2]))
        shown = batch.extra["classes"]
        assert shown.shape == likely.shape[:2]
        for row, labels in zip(shown, batch.labels, strict=True):  # what the crop shows, the image shows
            assert set(labels.unique().tolist()) - {0, IGNORE} <= set(row.nonzero().flatten().tolist())
        told = likely.mean((2, 3)).clamp(1e-6, 1 - 1e-6)
        return {
            "pixels": nn.functional.nll_loss((likely + 1e-6).log(), batch.labels, ignore_index=IGNORE),
            "classes": nn.functional.binary_cross_entropy(told, shown.to(told.dtype)),
        }

    def predict(self, output: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
        return self.semantic(output, size).argmax(1)


@pytest.mark.parametrize("selection", ["last", "best-on-test"])
def test_a_network_without_logits_is_trained_tested_and_selected(
    toy: Toy, offer: Offers, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.method.interface.LEAST_INTERVAL", 1)
    NETWORKS.add("masks", MaskKind())
    offer("masked", MaskMethod)
    plan = plan_of(toy, "masked", "network=masks", f"selection={selection}", "first_epochs=4")
    store = Store("r")
    session = train_all(plan, store)
    first, second = plan.jobs
    if selection == "best-on-test":
        assert session.best is not None
        assert session.best.score >= 0
    for key in (first, second):
        metrics = store.metrics(key)
        assert metrics is not None
        assert metrics.scores["default"].all is not None
        assert metrics.images == 12
    weights, _ = read_tensors(store.artifact(second) / "model.safetensors")
    assert {name for name in weights if name.startswith("classes.1")} == {
        "classes.1.weight",
        "classes.1.bias",
    }


# ---- what a batch brings, and who reads it -----------------------------------------------------------------


class Mapped(Method):
    """Fine-tuning that looks at the saliency maps."""

    found: set[int]

    @classmethod
    def maps(cls, config: Any) -> tuple[str, ...]:
        return ("saliency",)

    def start_step(self) -> None:
        self.found = set()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        saliency = batch.extra["saliency"]
        assert saliency.shape == batch.labels.shape
        self.found |= set(saliency.unique().tolist())
        labelled = (batch.labels > 0) & (batch.labels != IGNORE)
        assert (saliency[labelled] == 255).all()  # they are cut out and turned with the image
        return super().losses(batch)


def test_named_maps_reach_the_batch_with_their_padding(toy: Toy, offer: Offers, in_tmp: Path) -> None:
    offer("mapped", Mapped)
    protocol, said = toy(first=4), in_tmp / "toy-set.toml"
    common = ["first_epochs=1", "batch_size=4", "crop=60", "augmentation=scale-crop"]
    keys = []
    for padding in ("", "padding = 9\n"):
        said.write_text(said.read_text() + padding)
        plan = make_plan([str(protocol)], ["mapped"], overrides=common)
        session = train_all(plan, Store("r"))
        assert session.method.found == {0, 255, *([9] if padding else [])}  # type: ignore[attr-defined]
        keys += list(plan.jobs)
        assert set(plan.jobs[keys[-1]].inputs.data.maps) == {"saliency"}
    assert keys[0] != keys[1]


def test_validations_leave_no_process(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.method.interface.LEAST_INTERVAL", 1)
    monkeypatch.setattr("bench.train.session.default_workers", lambda *_: 2)
    plan, store = plan_of(toy, "ft", "selection=best-on-test", first=4), Store("r")
    (key,) = plan.jobs
    during: list[int] = []

    def watch(session: Session) -> None:
        assert session.data.workers == 2
        session.method.validations = 5  # type: ignore[misc]
        save = session.trainer.on_checkpoint
        session.trainer.checkpoint_seconds = 0

        def on_checkpoint(place: Place) -> None:
            if not place.batches:
                save(place)
                during.append(children())

        session.trainer.on_checkpoint = on_checkpoint

    session = train(plan, store, key, watch=watch)
    assert session.best is not None
    assert session.best.score > 0
    assert during == [2, 2]  # those that read the training images, and none of five validations
    assert children() == 0
    inline = Store("inline")
    monkeypatch.setattr("bench.train.session.default_workers", lambda *_: 0)
    train(plan, inline, key, watch=lambda s: setattr(s.method, "validations", 5))
    assert files(store, plan) == files(inline, plan)


def test_a_job_that_fails_leaves_no_process(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.train.session.default_workers", lambda *_: 2)
    plan = plan_of(toy, "ft", first=4)
    with pytest.raises(KeyboardInterrupt):
        train(plan, Store("r"), next(iter(plan.jobs)), watch=interrupted(1))
    assert children() == 0


def children() -> int:
    """Processes that this one started and that are not over."""
    return len(multiprocessing.active_children())


def test_a_teacher_never_trains(toy: Toy, quick: list[str]) -> None:
    """In no iteration and no epoch, and its statistics stand still."""
    plan, store = make_plan([str(toy(then=2))], ["mib"], overrides=[*quick, "epochs=2"]), Store("r")
    first, second = plan.jobs
    train(plan, store, first)
    seen: list[bool] = []

    def watch(session: Session) -> None:
        def looked(*_: int) -> None:
            seen.extend(module.training for module in session.method.teacher.modules())

        session.trainer.after_iteration = looked

    session = train(plan, store, second, watch=watch)
    assert seen
    assert not any(seen)
    left, _ = read_tensors(store.artifact(first) / "model.safetensors")
    assert all(torch.equal(t, left[name]) for name, t in session.method.teacher.state_dict().items())
