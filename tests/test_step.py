from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from bench import metrics
from bench.errors import UserError
from bench.launch import record
from bench.plan import Plan, make_plan
from bench.step import StepJob
from bench.store import Store, read_json
from bench.tensors import read_tensors, write_tensors
from bench.train import TrainingError

Toy = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


class Interrupted(StepJob):
    """A job whose process dies after its first epochs."""

    epochs = 1

    def save(self, phase: int, epochs: int) -> None:
        super().save(phase, epochs)
        self.epochs -= 1
        if not self.epochs:
            raise KeyboardInterrupt


def run_plan(plan: Plan, store: Store, kind: type[StepJob] = StepJob) -> None:
    """Every job of a plan in this process; `kind` for the last one."""
    store.make()
    for key, job in plan.jobs.items():
        if not store.done(key):
            store.open_work(key, record(job, plan))
            (kind if key == list(plan.jobs)[-1] else StepJob)(store, key).run()
            store.clear_work(key)


def files(store: Store, plan: Plan, names: Sequence[str]) -> dict[str, bytes]:
    return {f"{key}/{name}": (store.artifact(key) / name).read_bytes() for key in plan.jobs for name in names}


EXACT = ("model.safetensors", "state.safetensors", "metrics.json", "train.jsonl")


@pytest.mark.parametrize(
    "method",
    ["ft", "lwf", "lwf-mc", "ilt", "mib", "plop", "ssul", "ssul-m", "ewc", "pi", "rw", "joint", "ft-frozen", "dkd", "dkd@m", "eir", "mbs"],
)
def test_an_interrupted_step_ends_with_the_same_bits(toy: Toy, in_tmp: Path, quick: list[str], method: str) -> None:
    protocol = str(toy(then=2))
    epochs = ["first_epochs=3"] if method == "joint" else ["first_epochs=1", "epochs=3"]
    plan = make_plan([protocol], [method], overrides=[*quick, *epochs])
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    run_plan(plan, whole)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, broken, Interrupted)
    last = list(plan.jobs)[-1]
    assert not broken.done(last)
    StepJob(broken, last).run()
    assert files(whole, plan, EXACT) == files(broken, plan, EXACT)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(toy: Toy, in_tmp: Path, quick: list[str]) -> None:
    protocol = str(toy(then=2))
    plan = make_plan([protocol], ["mib"], overrides=quick)
    for name in ("a", "b"):
        run_plan(plan, Store(in_tmp / name))
    assert files(Store(in_tmp / "a"), plan, EXACT) == files(Store(in_tmp / "b"), plan, EXACT)
    other = make_plan([protocol], ["mib"], seeds=[1], overrides=quick)
    run_plan(other, Store(in_tmp / "a"))
    weights = [(Store(in_tmp / "a").artifact(next(iter(p.jobs))) / "model.safetensors").read_bytes() for p in (plan, other)]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("method", ["plop", "ssul-m", "rw", "nest+mib", "dkd@m", "eir", "mbs"])
def test_no_memory_is_read_before_it_is_written(toy: Toy, in_tmp: Path, quick: list[str], method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs train without torch's filling of new memory with NaN; with it their bits are the same."""
    plan = make_plan([str(toy(then=2))], [method], overrides=quick)
    for fill in (True, False):
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)
        run_plan(plan, Store(in_tmp / str(fill)))
    assert files(Store(in_tmp / "True"), plan, EXACT) == files(Store(in_tmp / "False"), plan, EXACT)


def test_the_artifact_holds_what_the_design_says(toy: Toy, in_tmp: Path, quick: list[str]) -> None:
    plan = make_plan([str(toy(then=2))], ["mib"], overrides=quick)
    store = Store("results")
    run_plan(plan, store)
    key = list(plan.jobs)[-1]
    folder = store.artifact(key)
    assert {p.name for p in folder.iterdir()} == {
        "job.json", "metrics.json", "confusion.npz", "model.safetensors", "state.safetensors", "state.json", "train.jsonl", "environment.json",
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(lines) == plan.jobs[key].iterations
    assert set(lines[0]) == {"phase", "epoch", "iteration", "lr", "ce", "kd"}
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    job = read_json(folder / "job.json")
    assert job["inputs"]["parent"] == next(iter(plan.jobs))
    counts = metrics.read_counts(folder / "confusion.npz")
    assert len(counts.images) == 12
    assert counts.total().sum() == 12 * 32 * 32  # no void here: every pixel of the central crops
    scores = read_json(folder / "metrics.json")["scores"]
    assert set(scores) == set(metrics.CONVENTIONS)
    assert len(scores["default"]["iou"]) == 5
    environment = read_json(folder / "environment.json")
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert read_json(store.artifact(next(iter(plan.jobs))) / "environment.json")["pretrained"] == "none: trained from scratch"
    assert not store.work(key).exists()


def test_learning_works_and_fine_tuning_forgets(toy: Toy, in_tmp: Path) -> None:
    protocol = str(toy(n_classes=3, images=48, first=2, then=1))
    run = bench.run(protocol, ["ft", "mib"], cluster="inline", set=["first_epochs=12", "epochs=6", "batch_size=4", "crop=32"], results="r")
    assert run.outcome.ok
    scores = {}
    for chain in run.plan.chains:
        last = read_json(Store("r").artifact(chain.keys[-1]) / "metrics.json")["scores"]["default"]
        first = read_json(Store("r").artifact(chain.keys[0]) / "metrics.json")["scores"]["default"]
        scores[chain.method.partition("[")[0]] = (first["all"], last["iou"])
    assert scores["ft"][0] > 0.6
    assert np.mean(scores["ft"][1][1:3]) < 0.2  # old classes are gone
    assert np.mean(scores["mib"][1][1:3]) > np.mean(scores["ft"][1][1:3]) + 0.15


def test_a_loss_that_is_not_finite_stops_the_job_with_its_name(toy: Toy, in_tmp: Path, quick: list[str]) -> None:
    plan = make_plan([str(toy())], ["ft"], overrides=[*quick, "first_lr=1e30"])
    store = Store("results")
    store.make()
    key, job = next(iter(plan.jobs.items()))
    store.open_work(key, record(job, plan))
    with pytest.raises(TrainingError, match=r"step 0, training, epoch \d, iteration \d+: loss term 'ce' is (nan|inf)"):
        StepJob(store, key).run()
    assert not store.done(key)


def test_a_batch_without_a_labelled_pixel_is_named_as_the_cause(toy: Toy, in_tmp: Path, quick: list[str]) -> None:
    plan = make_plan([str(toy())], ["mbs"], overrides=quick)
    store = Store("results")
    store.make()
    key, job = next(iter(plan.jobs.items()))
    store.open_work(key, record(job, plan))

    class Void(StepJob):
        def attach(self, classifier: str) -> None:
            super().attach(classifier)
            self.data.train.table = np.full(256, 255, np.uint8)
            self.data.train.__post_init__()

    with pytest.raises(TrainingError, match=r"is nan .*the batch has no labelled pixel"):
        Void(store, key).run()


def test_an_overflow_in_half_precision_leaves_no_importance(toy: Toy, in_tmp: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    eager = functools.partial(torch.amp.GradScaler, init_scale=2.0**120, backoff_factor=2.0**-60)
    monkeypatch.setattr(torch.amp, "GradScaler", eager)
    plan = make_plan([str(toy(then=2))], ["ewc", "rw", "pi"], overrides=[*quick, "precision=fp16"])
    store = Store("results")
    run_plan(plan, store)
    for key in plan.jobs:
        left = read_tensors(store.artifact(key) / "state.safetensors")[0]
        assert left
        assert all(np.isfinite(value).all() for value in left.values())


def test_importances_are_recorded_at_step_0_and_handed_on(toy: Toy, in_tmp: Path, quick: list[str]) -> None:
    plan = make_plan([str(toy(then=2))], ["ewc", "rw", "pi"], overrides=quick)
    store = Store("results")
    run_plan(plan, store)
    first = {key.split(".")[0] for key in read_tensors(store.artifact(next(iter(plan.jobs))) / "state.safetensors")[0]}
    assert first == {"ewc", "pi", "rw"}
    for chain in plan.chains:
        name = chain.method.partition("[")[0]
        left = read_tensors(store.artifact(chain.keys[-1]) / "state.safetensors")[0]
        assert {key.split(".")[0] for key in left} == {name}
        assert f"{name}.{'score' if name == 'pi' else 'fisher'}.classifier.heads.1.weight" in left


def test_a_step_0_without_importances_is_never_used_silently(toy: Toy, in_tmp: Path, quick: list[str]) -> None:
    plan = make_plan([str(toy(then=2))], ["ewc"], overrides=quick)
    store = Store("results")
    first, second = plan.jobs
    store.make()
    store.open_work(first, record(plan.jobs[first], plan))
    StepJob(store, first).run()
    write_tensors(store.artifact(first) / "state.safetensors", {})
    store.open_work(second, record(plan.jobs[second], plan))
    with pytest.raises(UserError, match="trained without recording 'ewc'"):
        StepJob(store, second).run()


@pytest.fixture
def finished_first_step(toy: Toy, in_tmp: Path, quick: list[str]) -> tuple[Store, Plan]:
    plan = make_plan([str(toy(then=2))], ["mib"], overrides=quick)
    store = Store("results")
    first, second = plan.jobs
    store.make()
    store.open_work(first, record(plan.jobs[first], plan))
    StepJob(store, first).run()
    store.open_work(second, record(plan.jobs[second], plan))
    return store, plan


def test_a_parent_that_is_cut_off(finished_first_step: tuple[Store, Plan]) -> None:
    store, plan = finished_first_step
    first, second = plan.jobs
    path = store.artifact(first) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cut off or damaged"):
        StepJob(store, second).run()


def test_a_parent_of_another_class_count(finished_first_step: tuple[Store, Plan]) -> None:
    store, plan = finished_first_step
    first, second = plan.jobs
    path = store.artifact(first) / "model.safetensors"
    weights, _ = read_tensors(path)
    weights["classifier.heads.0.weight"] = torch.zeros(9, *weights["classifier.heads.0.weight"].shape[1:])
    write_tensors(path, weights)
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit this network"):
        StepJob(store, second).run()


def test_a_parent_of_another_protocol_or_method(finished_first_step: tuple[Store, Plan]) -> None:
    store, plan = finished_first_step
    first, second = plan.jobs
    path = store.artifact(first) / "job.json"
    job = read_json(path)
    job["inputs"]["classes"] = [[2, 1]]
    path.write_text(json.dumps(job))
    with pytest.raises(UserError, match="another method, protocol or class order"):
        StepJob(store, second).run()


def test_data_that_changed_since_planning_is_refused(finished_first_step: tuple[Store, Plan], in_tmp: Path) -> None:
    store, plan = finished_first_step
    for index in in_tmp.rglob("class-index/train.txt"):
        index.write_text(index.read_text().replace("# fingerprint ", "# fingerprint 0"))
    with pytest.raises(UserError, match="is not the one that was planned with"):
        StepJob(store, list(plan.jobs)[1]).run()


def test_a_checkpoint_that_is_cut_off_costs_the_step_and_no_more(
    toy: Toy, in_tmp: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan([str(toy())], ["joint"], overrides=quick)
    store = Store("results")
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, store, Interrupted)
    key = next(iter(plan.jobs))
    path = store.work(key) / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    StepJob(store, key).run()
    assert re.search(r"WARNING: .*checkpoint\.safetensors: cut off or damaged .*; the step begins anew", capsys.readouterr().out)
    whole = Store("whole")
    run_plan(plan, whole)
    assert files(store, plan, EXACT) == files(whole, plan, EXACT)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(toy: Toy, in_tmp: Path, quick: list[str], precision: str) -> None:
    plan = make_plan([str(toy(then=2))], ["plop"], overrides=[*quick, f"precision={precision}"])
    store = Store("results")
    run_plan(plan, store)
    assert all(store.done(key) for key in plan.jobs)


def test_selection_on_test_images_keeps_the_best_and_resumes(toy: Toy, in_tmp: Path, quick: list[str]) -> None:
    plan = make_plan([str(toy(images=48, then=2))], ["joint"], overrides=[*quick, "first_epochs=10", "selection=best-on-test"])
    assert "best on the test images" in plan.chains[0].footnotes[-1]
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    run_plan(plan, whole)

    class Later(Interrupted):
        epochs = 9

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, broken, Later)
    StepJob(broken, next(iter(plan.jobs))).run()
    assert files(whole, plan, EXACT) == files(broken, plan, EXACT)
    last = make_plan([str(in_tmp / "toy-2-2.toml")], ["joint"], overrides=[*quick, "first_epochs=10"])
    run_plan(last, whole)
    assert (whole.artifact(next(iter(last.jobs))) / "model.safetensors").read_bytes() != files(whole, plan, EXACT)[
        f"{next(iter(plan.jobs))}/model.safetensors"
    ]
