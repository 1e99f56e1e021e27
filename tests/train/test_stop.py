"""When a checkpoint is written: by time, at a signal once the iteration is over, at the end of a phase."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import files, train

from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.store.results import Store
from bench.train.session import Session
from bench.train.stop import SIGNALS, Stop
from bench.train.trainer import Place

Toy = Callable[..., Path]
ASKED = signal.SIGUSR2
"""By which a cluster asks for a checkpoint."""


@pytest.fixture
def answered() -> Iterator[list[int]]:
    """Signals that reached whoever answered them before."""
    heard: list[int] = []
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in SIGNALS}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_an_iteration_and_a_second_one_does_not(
    answered: list[int], number: int
) -> None:
    with Stop() as stop:
        os.kill(os.getpid(), number)
        assert answered == [number]  # no iteration runs
        stop.iterating = True
        os.kill(os.getpid(), number)
        assert answered == [number]
        assert stop.asked == number
        os.kill(os.getpid(), number)
        assert answered == [number] * 2
        stop.act()
        assert answered == [number] * 3
        stop.act()
        assert answered == [number] * 3
    os.kill(os.getpid(), number)
    assert answered == [number] * 4


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            stop.iterating = True
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked is None
    finally:
        signal.signal(signal.SIGINT, before)


def saved(session: Session) -> list[Place]:
    """Places of the checkpoints that a session writes from now on."""
    save, places = session.trainer.on_checkpoint, []

    def on_checkpoint(place: Place) -> None:
        save(place)
        places.append(place)

    session.trainer.on_checkpoint = on_checkpoint
    return places


def one_job(toy: Toy, quick: list[str], *more: str) -> Plan:
    return make_plan([str(toy(images=24))], ["joint"], overrides=[*quick, "first_epochs=3", *more])


def test_a_job_that_is_asked_to_end_leaves_off_after_the_iteration_and_goes_on_with_the_same_bits(
    toy: Toy, in_tmp: Path, quick: list[str]
) -> None:
    plan = one_job(toy, quick)
    (key,) = plan.jobs
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    train(plan, whole, key)
    places: list[Place] = []

    def watch(session: Session) -> None:
        nonlocal places
        places = saved(session)

        def asked(done: int, total: int) -> None:
            if done == total // 3 + 2:  # in the second epoch
                os.kill(os.getpid(), signal.SIGINT)

        session.trainer.after_iteration = asked

    with pytest.raises(KeyboardInterrupt):
        train(plan, broken, key, watch=watch)
    assert places == [Place(0, 1, 2)]
    train(plan, broken, key)
    assert files(whole, plan) == files(broken, plan)


@pytest.mark.parametrize("minutes", [0, 5])
def test_checkpoints_come_by_time_and_at_the_end(
    toy: Toy, in_tmp: Path, quick: list[str], minutes: int
) -> None:
    plan = one_job(toy, quick, f"checkpoint_minutes={minutes}")
    (key,) = plan.jobs
    places: list[Place] = []
    batches = 0

    def watch(session: Session) -> None:
        nonlocal places, batches
        places, batches = saved(session), len(session.data.train) // session.method.config.batch_size

    train(plan, Store(in_tmp), key, watch=watch)
    assert batches > 2
    each = [Place(0, *divmod(done, batches)) for done in range(1, 3 * batches + 1)]
    assert places == (each[-1:] if minutes else each)


def test_how_often_is_no_part_of_the_key(toy: Toy, quick: list[str]) -> None:
    protocol = str(toy())
    plans = [make_plan([protocol], ["ft"], overrides=[*quick, f"checkpoint_minutes={m}"]) for m in (0, 1, 5)]
    assert list(plans[0].jobs) == list(plans[1].jobs) == list(plans[2].jobs)
