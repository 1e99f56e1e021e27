"""NeST around other methods: what it replaces, what it leaves alone, and that an interruption changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench import protocol as protocols
from bench.errors import UserError
from bench.launch import record
from bench.plan import Plan, make_plan
from bench.recipe import Recipe, resolve
from bench.registry import method
from bench.step import StepJob
from bench.store import Store
from bench.tensors import read_tensors
from methods.nest import ClassSimilarity, NeST, Transformation, finalised_classifier
from methods.pi import PathIntegral

Toy = Callable[..., Path]
Weights = dict[str, Tensor]
SETTINGS = ("epochs=2", "first_epochs=1", "batch_size=4", "crop=32")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


class Stopped(StepJob):
    """A job whose process dies after some epochs, counted over all phases."""

    epochs = 1

    def save(self, phase: int, epochs: int) -> None:
        super().save(phase, epochs)
        self.epochs -= 1
        if not self.epochs:
            raise KeyboardInterrupt


class Watched(StepJob):
    """A job that keeps, by phase name, the weights each phase starts from and ends with, and the best score on test images after it."""

    seen: dict[str, tuple[Weights, Weights]]
    scores: dict[str, float]

    def run(self) -> None:
        self.seen, self.scores = {}, {}
        super().run()

    def resume_or_start(self) -> tuple[int, int, dict[str, Any] | None]:
        plain = self.trainer.run

        def run(index: int, phase: Any, *more: Any) -> None:
            before = self.weights()
            plain(index, phase, *more)
            self.seen[phase.name] = before, self.weights()
            self.scores[phase.name] = self.best.score if self.best else -1.0

        self.trainer.run = run  # type: ignore[method-assign]
        return super().resume_or_start()

    def weights(self) -> Weights:
        return {name: value.clone() for name, value in self.method.network.state_dict().items()}


def plan_of(protocol: Path, name: str, more: Sequence[str] = ()) -> Plan:
    """Two pre-tuning epochs and two of the wrapped method, on a toy data set in two steps."""
    return make_plan([str(protocol)], [name], overrides=[*SETTINGS, "pretuning_epochs=2", *more])


def run_last(plan: Plan, store: Store, kind: type[StepJob] = StepJob) -> StepJob:
    """All jobs of a plan in this process; the last one as `kind`, and returned."""
    store.make()
    for key in plan.jobs:
        if not store.done(key):
            store.open_work(key, record(plan.jobs[key], plan))
            job = (kind if key == list(plan.jobs)[-1] else StepJob)(store, key)
            job.run()
    return job


def log(store: Store, key: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store.artifact(key) / "train.jsonl").read_text().splitlines()]


# ---- what it does to a step ------------------------------------------------------------------------------------------------


def test_pretuning_writes_the_new_rows_and_the_background_row_and_nothing_else(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+mib")
    job = run_last(plan, Store("r"), Watched)
    before, after = job.seen["pre-tuning"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in moved if "running" in name}
    assert moved - statistics == {"classifier.heads.0.weight", "classifier.heads.1.weight", "classifier.heads.1.bias"}
    assert statistics  # the body is frozen in weights only
    assert torch.equal(before["classifier.heads.0.weight"][1:], after["classifier.heads.0.weight"][1:])
    assert torch.equal(after["classifier.heads.0.weight"], job.seen["training"][0]["classifier.heads.0.weight"])


def test_the_log_shows_both_phases_and_the_last_update_of_pretuning_is_void(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+mib", ["nest+mib.pretuning_lr_scale=3.0"])
    store = Store("r")
    run_last(plan, store)
    lines = log(store, list(plan.jobs)[-1])
    pretuning = [line for line in lines if line["phase"] == "pre-tuning"]
    main = [line for line in lines if line["phase"] == "training"]
    assert lines == pretuning + main
    assert len(pretuning) == len(main) > 2
    assert set(pretuning[0]) == {"phase", "epoch", "iteration", "lr", "ce"}
    assert set(main[0]) == {"phase", "epoch", "iteration", "lr", "ce", "kd"}
    lr = plan.jobs[list(plan.jobs)[-1]].settings["lr"]
    total = len(pretuning)
    assert [line["lr"] for line in pretuning] == pytest.approx([3 * lr * (1 - k / total) ** 0.9 for k in range(1, total + 1)])
    assert pretuning[-1]["lr"] == 0
    assert main[0]["lr"] == lr


def test_the_transformation_leaves_no_trace_in_the_artifact(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+plop")
    store = Store("r")
    run_last(plan, store)
    tensors, _ = read_tensors(store.artifact(list(plan.jobs)[-1]) / "state.safetensors")
    assert set(tensors) == {"thresholds"}


@pytest.mark.parametrize("frozen", [True, False])
def test_old_heads_can_be_frozen_while_the_wrapped_method_trains(toy: Toy, frozen: bool) -> None:
    plan = plan_of(toy(then=2), "nest+plop", [f"freeze_old_classifier={str(frozen).lower()}"])
    job = run_last(plan, Store("r"), Watched)
    before, after = job.seen["training"]
    for name in ("classifier.heads.0.weight", "classifier.heads.0.bias"):
        assert torch.equal(before[name], after[name]) is frozen
    assert not torch.equal(before["classifier.heads.1.weight"], after["classifier.heads.1.weight"])
    first_conv = next(name for name in before if name.startswith("body."))
    assert not torch.equal(before[first_conv], after[first_conv])


def test_a_regulariser_neither_sees_nor_holds_the_pretuning(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+ewc")
    store = Store("r")
    run_last(plan, store)
    terms = {line["phase"]: set(line) - {"phase", "epoch", "iteration", "lr"} for line in log(store, list(plan.jobs)[-1])}
    assert terms == {"pre-tuning": {"ce"}, "training": {"ce", "penalty"}}


def test_one_random_bias_for_all_new_classes_or_the_one_that_is_asked_for(toy: Toy) -> None:
    class Begun(StepJob):
        def resume_or_start(self) -> tuple[int, int, dict[str, Any] | None]:
            started = super().resume_or_start()
            self.started = {name: value.clone() for name, value in self.method.state.items()}
            return started

    protocol, store = toy(then=2), Store("r")
    drawn = run_last(plan_of(protocol, "nest+ft"), store, Begun).started
    given = run_last(plan_of(protocol, "nest+ft", ["beta_init=0.25"]), store, Begun).started
    beta = drawn["nest.new_bias"]
    assert beta.tolist() == [beta[0].item()] * 2
    assert 0 < beta[0].abs() < 1 / 64**0.5
    assert given["nest.new_bias"].tolist() == [0.25, 0.25]
    assert torch.equal(drawn["nest.importance"], given["nest.importance"])
    assert drawn["nest.importance"].shape == (2, 3, 64)
    assert drawn["nest.mixing"].sum(1).tolist() == pytest.approx([1, 1])
    assert drawn["nest.background_importance"].eq(1).all()
    assert drawn["nest.background_mixing"].tolist() == [[1]]


def test_without_epochs_only_the_similarity_initialises(toy: Toy) -> None:
    job = run_last(plan_of(toy(then=2), "nest+mib", ["pretuning_epochs=0"]), Store("r"), Watched)
    before, after = job.seen["pre-tuning"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= {"classifier.heads.0.weight", "classifier.heads.1.weight", "classifier.heads.1.bias"}
    assert torch.allclose(before["classifier.heads.0.weight"], after["classifier.heads.0.weight"], atol=1e-6)


def test_selection_considers_the_main_phase_only(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.selection.LEAST_INTERVAL", 1)
    job = run_last(plan_of(toy(then=2), "nest+mib", ["selection=best-on-test"]), Store("r"), Watched)
    assert job.scores["pre-tuning"] < 0 <= job.scores["training"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_runs_in_half_precision(toy: Toy, precision: str) -> None:
    plan = plan_of(toy(then=2), "nest+plop", [f"precision={precision}"])
    job = run_last(plan, Store("r"), Watched)
    before, after = job.seen["pre-tuning"]
    assert not torch.equal(before["classifier.heads.1.weight"], after["classifier.heads.1.weight"])


@pytest.mark.parametrize("name", ["nest+ft", "nest+lwf", "nest+lwf-mc", "nest+ilt", "nest+rw", "nest+pi"])
def test_it_wraps_whatever_has_a_linear_classifier(toy: Toy, name: str) -> None:
    plan = plan_of(toy(then=1), name, ["pretuning_epochs=1", "epochs=1"])
    store = Store("r")
    run_last(plan, store)
    assert all(store.done(key) for key in plan.jobs)
    assert len(plan.jobs) == 3


def test_it_runs_on_a_swin_body(toy: Toy) -> None:
    plan = plan_of(toy(then=2), "nest+plop", ['network="small-swin"'])
    job = run_last(plan, Store("r"), Watched)
    before, after = job.seen["pre-tuning"]  # no statistics in layer norms: the body stays as it is
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("body."))


# ---- interruptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "where"), [(1, "phase 0, 1 epochs"), (2, "phase 0, 2 epochs"), (3, "phase 1, 1 epochs")], ids=["pre-tuning", "between", "training"]
)
@pytest.mark.parametrize("name", ["nest+mib", "nest+plop", "nest+ewc"])
def test_an_interrupted_step_ends_with_the_same_bits(
    toy: Toy, in_tmp: Path, capsys: pytest.CaptureFixture[str], name: str, epochs: int, where: str
) -> None:
    plan = plan_of(toy(then=2), name, ["freeze_old_classifier=true"] if name == "nest+plop" else [])
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    run_last(plan, whole)
    with pytest.raises(KeyboardInterrupt):
        run_last(plan, broken, type("Stopped", (Stopped,), {"epochs": epochs}))
    last = list(plan.jobs)[-1]
    assert not broken.done(last)
    StepJob(broken, last).run()
    assert f"resuming {last}: {where} done" in capsys.readouterr().out
    for file in ("model.safetensors", "state.safetensors", "metrics.json", "train.jsonl"):
        assert (whole.artifact(last) / file).read_bytes() == (broken.artifact(last) / file).read_bytes(), file


# ---- similarity and finalisation ------------------------------------------------------------------------------------------


def test_similarity_in_batches_is_that_of_single_images() -> None:
    torch.manual_seed(0)
    features, logits, old = torch.randn(6, 8, 4, 4), torch.randn(6, 3, 32, 32), torch.randn(3, 8)
    labels = torch.randint(0, 5, (6, 32, 32))
    labels[labels == 1] = 255
    single, batched = ClassSimilarity(old, 2), ClassSimilarity(old, 2)
    for k in range(6):
        single.update(features[k : k + 1], logits[k : k + 1], labels[k : k + 1])
    batched.update(features[:4], logits[:4], labels[:4])
    batched.update(features[4:], logits[4:], labels[4:])
    assert torch.equal(single.pixels, batched.pixels)
    assert torch.allclose(single.importance(), batched.importance(), rtol=1e-6)
    assert torch.allclose(single.mixing(), batched.mixing(), rtol=1e-5)
    assert single.importance().min() >= 0
    assert single.importance().max() <= 1


def test_similarity_by_the_definition() -> None:
    """Pixel by pixel, class by class, feature by feature."""
    torch.manual_seed(1)
    n_old, side = 2, 128
    features, logits, old = torch.randn(1, 3, side, side), torch.randn(1, n_old, side, side), torch.randn(n_old, 3)
    labels = torch.zeros(1, side, side, dtype=torch.long)
    where = [(3, 5), (70, 70), (127, 0)]
    for y, x in where:
        labels[0, y, x] = n_old
    found = ClassSimilarity(old, 1)
    found.update(features, logits, labels)
    expected = np.zeros((n_old, 3))
    for y, x in where:
        p = logits[0, :, y, x].softmax(0)
        for c in range(n_old):
            for d in range(3):
                expected[c, d] += float(p[c]) * float(features[0, d, y, x] * old[c, d] > 0) / len(where)
    assert found.importance()[0].numpy() == pytest.approx(expected, rel=1e-5)


def test_generated_rows_take_the_scale_of_the_old_ones() -> None:
    torch.manual_seed(2)
    old, bias = torch.randn(4, 16), torch.randn(4)
    learned = Transformation(torch.rand(2, 4, 16), torch.rand(2, 4), torch.randn(2), torch.rand(1, 16), torch.rand(1, 1))
    weight, new_bias = finalised_classifier(old, bias, learned)
    assert torch.equal(weight[1:4], old[1:])
    assert torch.equal(new_bias[:4], bias)
    assert weight[0].norm() == pytest.approx(old[0].norm())
    assert weight[4:].norm(dim=1).mean() == pytest.approx(old.norm(dim=1).mean())
    assert new_bias[4:].norm() == pytest.approx(bias.norm())
    assert torch.equal(new_bias[4:].sign(), learned.new_bias.sign())


def test_a_class_without_a_pixel_on_the_grid_is_named(toy: Toy, in_tmp: Path) -> None:
    protocol = toy(n_classes=4, images=12, size=320, then=1)
    for path in (in_tmp / "toy" / "masks").glob("train*.png"):  # of class 3, one pixel is left: the crop to 32 pixels loses it
        mask = np.array(Image.open(path))
        there = np.argwhere(mask == 3)
        mask[mask == 3] = 0
        for y, x in there[:1]:
            mask[y, x] = 3
        Image.fromarray(mask).save(path)
    plan = make_plan([str(protocol)], ["nest+ft"], overrides=[*SETTINGS, "batch_size=2"])
    store = Store("r")
    store.make()
    first, second = list(plan.jobs)[:2]
    store.open_work(first, record(plan.jobs[first], plan))
    StepJob(store, first).run()
    store.open_work(second, record(plan.jobs[second], plan))
    with pytest.raises(UserError, match=r"step 1: class 3 \(c3\) has no pixel on NeST's grid of 128 x 128 in any of the \d+ training crops"):
        StepJob(store, second).run()


def test_a_smoke_run_passes_without_meeting_every_class(toy: Toy) -> None:
    protocol = toy(n_classes=12, images=48, first=2, then=10)
    plan = make_plan([str(protocol)], ["nest+mib"], overrides=[*SETTINGS, "batch_size=2"], smoke=True)  # four images show no ten classes
    store = Store("r", smoke=True)
    run_last(plan, store)
    assert all(store.done(key) for key in plan.jobs)


# ---- composition and recipes ---------------------------------------------------------------------------------------------


def test_wrapper_and_wrapped_share_their_state() -> None:
    spec = method("nest+plop")
    built = spec.build(spec.config())
    assert isinstance(built, NeST)
    assert built.base.state is built.state
    assert built.base.config is built.config


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nest", "write for example nest\\+ft"),
        ("nest+joint", "cannot wrap 'joint'"),
        ("nest+nest+ft", "cannot wrap 'nest\\+ft'"),
        ("nest+ssul", "works on a classifier of kind 'linear', and that of 'ssul' is 'conv-heads'"),
        ("mib+nest", "'mib' does not wrap another method"),
        ("nest+mibs", "did you mean 'mib'"),
        ("nest@swim+mib", "did you mean 'swin'"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_in_words(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        method(name)


def test_one_step_0_for_the_wrapped_method_and_every_composition_of_it(toy: Toy) -> None:
    plan = make_plan([str(toy(then=2))], ["ft", "mib", "nest+mib", "nest+plop"], overrides=[*SETTINGS])
    assert len({chain.keys[0] for chain in plan.chains}) == 1
    assert len({chain.keys[1] for chain in plan.chains}) == 4


def published(name: str, protocol: str) -> Recipe:
    return resolve(method(name), protocols.load(protocol), "published")


@pytest.mark.parametrize(
    ("name", "protocol", "values"),
    [
        ("nest+mib", "voc-15-1", {"epochs": 30, "pretuning_epochs": 5, "pretuning_lr_scale": 1, "distillation": 10, "freeze_old_classifier": False}),
        ("nest+mib", "voc-10-1", {"epochs": 10, "first_epochs": 30, "pretuning_epochs": 5, "network": "deeplab-abn-resnet101"}),
        ("nest+mib", "ade-100-5", {"epochs": 60, "pretuning_epochs": 15, "pretuning_lr_scale": 500, "distillation": 10}),
        ("nest+plop", "voc-15-1", {"pod": 0.01, "freeze_old_classifier": True, "precision": "fp16"}),
        ("nest+plop", "ade-100-5", {"pod": 0.001, "pod_logits": 1e-5, "freeze_old_classifier": False}),
        ("nest@swin+mib", "voc-15-1", {"network": "deeplab-abn-swin-b", "pretrained": "swin_base_patch4_window12_384.pth", "epochs": 30}),
    ],
)
def test_recipes_are_those_of_the_scripts(name: str, protocol: str, values: dict[str, Any]) -> None:
    config = published(name, protocol).config
    common = {"first_lr": 0.02, "lr": 0.001, "batch_size": 24, "crop": 512, "label_rule": "plop", "weight_decay": 1e-4, "selection": "last"}
    assert {key: getattr(config, key) for key in {**common, **values}} == {**common, **values}


def test_the_source_of_what_depends_on_the_wrapped_method_is_named() -> None:
    assert published("nest+mib", "voc-15-1").sources["distillation"] == "nest.toml [on.mib.published]"
    assert published("nest+plop", "voc-15-1").sources["freeze_old_classifier"] == "nest.toml [on.plop.method], data set voc"


def test_a_path_integral_starts_where_the_wrapped_training_does() -> None:
    """Pre-tuning writes new rows after the step began: the way is measured from what the first update of the main phase sees."""
    recorder = PathIntegral({}, None)
    recorder.begin({"w": torch.tensor([1.0])}, {})
    recorder.update({"w": torch.tensor([3.0])}, {"w": torch.tensor([5.0])})
    recorder.update({"w": torch.tensor([-2.0])}, {"w": torch.tensor([6.0])})
    recorder.finish({"w": torch.tensor([7.0])})
    assert recorder.state["pi.score.w"].item() == pytest.approx(-2 * (5 - 6) / (7 - 5) ** 2)
