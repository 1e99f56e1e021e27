"""The same job gives the same bits: again, after an interruption, and whatever memory held before."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import dies_after, dies_within, files, interrupted, train, train_all

from bench.plan.make import make_plan
from bench.store.results import Store
from bench.train import session
from bench.train.job import do, run_job

Toy = Callable[..., Path]
METHODS = (
    "ft", "lwf", "lwf-mc", "ilt", "mib", "plop", "ssul", "ssul-m", "ewc", "pi", "rw", "joint", "ft-frozen",
    "dkd", "dkd@m", "eir", "mbs", "barm", "dft", "reminder", "ucd", "star", "star@m",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_step_ends_with_the_same_bits(
    toy: Toy, in_tmp: Path, quick: list[str], method: str
) -> None:
    protocol = str(toy(then=2))
    epochs = ["first_epochs=3"] if method == "joint" else ["first_epochs=1", "epochs=3"]
    plan = make_plan([protocol], [method], overrides=[*quick, *epochs])
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    train_all(plan, whole)
    with pytest.raises(KeyboardInterrupt):
        train_all(plan, broken, interrupted(1))
    last = list(plan.jobs)[-1]
    assert not broken.done(last)
    do(broken.record(last), broken)
    assert files(whole, plan) == files(broken, plan)


@pytest.mark.parametrize("method", [*METHODS, "nest+plop"])
def test_a_step_interrupted_within_an_epoch_ends_with_the_same_bits(
    toy: Toy, in_tmp: Path, quick: list[str], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropout, replay and pastes go on drawing where they stood; the journal has each iteration once."""
    protocol = str(toy(images=24, then=2))
    epochs = ["first_epochs=2"] if method == "joint" else ["first_epochs=1", "epochs=2"]
    plan = make_plan([protocol], [method], overrides=[*quick, *epochs])
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    train_all(plan, whole)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_all(plan, broken, lambda session: dies_within(2, session))
    last = list(plan.jobs)[-1]
    do(broken.record(last), broken)
    assert " and 2 batches done" in capsys.readouterr().out
    assert files(whole, plan) == files(broken, plan)


def test_a_step_is_interrupted_after_its_second_epoch_and_again(
    toy: Toy, in_tmp: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan([str(toy(then=2))], ["plop"], overrides=[*quick, "first_epochs=1", "epochs=4"])
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    train_all(plan, whole)
    last = list(plan.jobs)[-1]
    for epochs in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            train_all(plan, broken, interrupted(epochs))
    train(plan, broken, last)
    said = capsys.readouterr().out
    assert f"resuming {last}: phase 0, 2 epochs done" in said
    assert f"resuming {last}: phase 0, 3 epochs done" in said
    assert files(whole, plan) == files(broken, plan)


def test_the_entry_point_of_a_process_resumes_too(toy: Toy, in_tmp: Path, quick: list[str]) -> None:
    plan = make_plan([str(toy())], ["joint"], overrides=[*quick, "first_epochs=3"])
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    train_all(plan, whole)
    with pytest.raises(KeyboardInterrupt):
        train_all(plan, broken, interrupted(2))
    (key,) = plan.jobs
    run_job(str(in_tmp / "broken"), key)
    assert not broken.work(key).exists()
    assert files(whole, plan) == files(broken, plan)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    toy: Toy, in_tmp: Path, quick: list[str]
) -> None:
    protocol = str(toy(then=2))
    plan = make_plan([protocol], ["mib"], overrides=quick)
    for name in ("a", "b"):
        train_all(plan, Store(in_tmp / name))
    assert files(Store(in_tmp / "a"), plan) == files(Store(in_tmp / "b"), plan)
    other = make_plan([protocol], ["mib"], seeds=[1], overrides=quick)
    train_all(other, Store(in_tmp / "a"))
    first = [Store(in_tmp / "a").artifact(next(iter(p.jobs))) / "model.safetensors" for p in (plan, other)]
    assert first[0].read_bytes() != first[1].read_bytes()


@pytest.mark.parametrize("method", ["plop", "ssul-m", "rw", "nest+mib", "dkd@m", "eir", "mbs"])
def test_no_memory_is_read_before_it_is_written(
    toy: Toy, in_tmp: Path, quick: list[str], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs train without torch's filling of new memory with NaN; with it their bits are the same."""
    from bench.train import session

    plan = make_plan([str(toy(then=2))], [method], overrides=quick)
    plain = session.prepare_process
    for fill in (True, False):

        def prepare(device: torch.device, threads: int, fill: bool = fill) -> None:
            plain(device, threads)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]

        monkeypatch.setattr(session, "prepare_process", prepare)
        train_all(plan, Store(in_tmp / str(fill)))
    assert files(Store(in_tmp / "True"), plan) == files(Store(in_tmp / "False"), plan)


def test_a_checkpoint_that_is_cut_off_costs_the_step_and_no_more(
    toy: Toy, in_tmp: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan([str(toy())], ["joint"], overrides=quick)
    store, whole = Store("results"), Store("whole")
    with pytest.raises(KeyboardInterrupt):
        train_all(plan, store, interrupted(1))
    (key,) = plan.jobs
    path = store.work(key) / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train(plan, store, key)
    assert re.search(
        r"WARNING: .*checkpoint\.safetensors: cut off or damaged .*; the step begins anew",
        capsys.readouterr().out,
    )
    train_all(plan, whole)
    assert files(store, plan) == files(whole, plan)


def test_selection_on_test_images_keeps_the_best_and_resumes(
    toy: Toy, in_tmp: Path, quick: list[str]
) -> None:
    protocol = str(toy(images=48, then=2))
    chosen = [*quick, "first_epochs=10", "selection=best-on-test"]
    plan = make_plan([protocol], ["joint"], overrides=chosen)
    assert "best on the test images" in plan.chains[0].footnotes[-1]
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    train_all(plan, whole)
    with pytest.raises(KeyboardInterrupt):
        train_all(plan, broken, lambda session: dies_after(9, session))
    (key,) = plan.jobs
    train(plan, broken, key)
    assert files(whole, plan) == files(broken, plan)
    last = make_plan([protocol], ["joint"], overrides=[*quick, "first_epochs=10"])
    train_all(last, whole)
    (other,) = files(whole, last, ["model.safetensors"]).values()
    assert other != files(whole, plan)[f"{key}/model.safetensors"]


def test_what_was_logged_after_the_last_checkpoint_is_not_logged_twice(
    toy: Toy, in_tmp: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies as it writes its second checkpoint: by then the log is on disk."""
    plan = make_plan([str(toy())], ["joint"], overrides=[*quick, "first_epochs=2", "checkpoint_minutes=0"])
    (key,) = plan.jobs
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    train(plan, whole, key)
    write, written = session.write_tensors, itertools.count(1)

    def dies(*arguments: Any) -> None:
        if next(written) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(session, "write_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        train(plan, broken, key)
    monkeypatch.undo()
    assert len((broken.work(key) / "train.jsonl").read_text().splitlines()) == 2
    monkeypatch.chdir(in_tmp)
    train(plan, broken, key)
    assert files(whole, plan) == files(broken, plan)
