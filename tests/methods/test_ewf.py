"""EWF: a chain of three steps against the same chain computed straight on, its settings, its compositions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chains import Done, cross_entropy, fit, given_batches, mib_losses, run_chain
from jobs import files, interrupted, train, train_all
from plans import INDEX, plan_of
from torch import Tensor, nn

from bench.errors import UserError
from bench.method.registry import method
from bench.method.resolve import resolve
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.store.results import Store
from methods.ewf import fused_weights
from methods.plop import EntropyThresholds

Toy = Callable[..., Path]
SIZES = (3, 2, 1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


# ---- a chain, straight on ----------------------------------------------------------------------------------


def straight(chain: list[Done]) -> list[tuple[list[dict[str, float]], dict[str, Tensor]]]:
    """EWF around MiB from the specification: (losses, weights that the step leaves) of each step.

    Source: spec/ewf.md section 1 and section 2.
    """
    found = []
    network: nn.Module = copy.deepcopy(chain[0].opened)
    losses = fit(
        network,
        list(network.parameters()),
        chain[0].batches,
        0.05,
        lambda z, b: cross_entropy(z, b["labels"]),
    )
    found.append((losses, {k: v.clone() for k, v in network.state_dict().items()}))
    for t in (1, 2):
        old = copy.deepcopy(network).eval().requires_grad_(False)
        network = copy.deepcopy(chain[t].opened)
        new_head = {k: v for k, v in network.state_dict().items() if k not in old.state_dict()}
        network.load_state_dict({**old.state_dict(), **new_head})
        n, c_old = SIZES[t], sum(SIZES[:t])
        row, biases, new_row, new_bias = (
            network.get_parameter(f"classifier.heads.{head}.{what}")
            for head in (0, t)
            for what in ("weight", "bias")
        )
        with torch.no_grad():
            bias = biases[0] - math.log(n + 1)
            new_row[:] = row[:1]
            new_bias[:] = bias
            biases[0] = bias
        old_heads = tuple(f"classifier.heads.{head}." for head in range(t))

        def step_losses(z: Tensor, b: dict[str, Tensor], old: nn.Module = old) -> dict[str, Tensor]:
            return mib_losses(z, old(b["images"]).logits, b["labels"], 10.0)

        trained = [p for name, p in network.named_parameters() if not name.startswith(old_heads)]
        losses = fit(network, trained, chain[t].batches, 0.02, step_losses)  # type: ignore[arg-type]
        a = math.sqrt(n / (n + c_old))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                if name in old.state_dict() and value.is_floating_point():
                    value.copy_((1 - a) * old.state_dict()[name] + a * value)
        found.append((losses, {k: v.clone() for k, v in network.state_dict().items()}))
    return found


def test_three_steps_are_those_of_the_specification(in_tmp: Path) -> None:
    chain = run_chain(in_tmp / "r", "ewf+mib", SIZES, given_batches(SIZES))
    for t, (losses, weights) in enumerate(straight(chain)):
        assert len(losses) == len(chain[t].losses) == 3
        for got, want in zip(chain[t].losses, losses, strict=True):
            assert got == pytest.approx(want, rel=1e-9)
        assert set(weights) == set(chain[t].weights)
        for name, weight in weights.items():
            torch.testing.assert_close(
                chain[t].weights[name], weight, rtol=1e-8, atol=1e-11, msg=f"{t} {name}"
            )


def test_running_statistics_are_fused_and_a_count_of_batches_is_not() -> None:
    norm = nn.BatchNorm2d(2)
    assert "num_batches_tracked" in norm.state_dict()
    from methods.ewf import floating

    assert set(floating(norm)) == {"weight", "bias", "running_mean", "running_var"}


# ---- settings ----------------------------------------------------------------------------------------------


def test_only_what_moved_most_is_fused_with_the_threshold() -> None:
    old = {"a": torch.zeros(6), "b": torch.zeros(2, 2)}
    moves = torch.arange(1.0, 11.0)
    new = {"a": moves[:6], "b": -moves[6:].view(2, 2), "c": torch.ones(1)}
    fused = fused_weights(old, new, 3, 1, 0.45)  # floor(4.5) = 4 of ten
    assert fused["a"].tolist() == moves[:6].tolist()
    assert fused["b"].flatten().tolist() == pytest.approx([-3.5, -4, -4.5, -5])
    assert fused["c"].tolist() == [1]
    everything = fused_weights(old, new, 3, 1)
    assert everything["a"].tolist() == pytest.approx((moves[:6] / 2).tolist())


def test_the_threshold_leaves_another_network(in_tmp: Path) -> None:
    sizes = (2, 1)
    batches = given_batches(sizes, 2)
    plain, some = (
        run_chain(in_tmp / name, name, sizes, batches)[-1].weights
        for name in ("ewf+mib", "ewf@threshold+mib")
    )
    differing = [name for name in plain if not torch.equal(plain[name], some[name])]
    assert any("running" in name for name in differing)
    assert len(differing) > 3


def test_single_precision_counts_saturate_around_plop() -> None:
    logits = torch.tensor([9.0, 0.0]).view(1, 2, 1, 1).repeat(1, 1, 1, 60)
    found = {}
    for limit in (None, 10):
        thresholds = EntropyThresholds(2, 3, limit=limit)
        thresholds.update(logits, torch.zeros(1, 1, 60, dtype=torch.long))
        thresholds.histogram[0, 1] += 30
        found[limit] = thresholds.thresholds()[0].item()
    assert found[None] == pytest.approx(45 / 60 / 100)
    assert found[10] == pytest.approx(10 / 10 / 100)
    limits = {
        name: resolve(method(name), load("shapes-6-2"), "small").config.model_dump()["histogram_limit"]
        for name in ("ewf+plop", "plop")
    }
    assert limits == {"ewf+plop": 2**24, "plop": None}


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_share_that_is_none_is_one_line(value: float) -> None:
    with pytest.raises(UserError, match="fused_share"):
        resolve(method("ewf+mib"), load("shapes-6-2"), "small", [("fused_share", value)])


# ---- step 0, compositions ----------------------------------------------------------------------------------


def test_step_0_is_that_of_the_wrapped_method() -> None:
    names = ["ft", "mib", "plop", "ewf+mib", "ewf+plop", "ewf@threshold+mib", "ewf+nest+mib"]
    plan = plan_of(names)
    assert len({chain.keys[0] for chain in plan.chains}) == 1
    assert len({chain.keys[1] for chain in plan.chains}) == len(names)
    published = make_plan(
        ["voc-15-1"],
        ["plop", "mib@preset", "ewf+mib", "ewf+plop"],
        "published",
        overrides=["batch_size=2", 'pretrained="imagenet"'],
        indexes={"voc": {"train": INDEX_OF_VOC, "test": INDEX_OF_VOC}},
    )
    assert len({chain.keys[0] for chain in published.chains}) == 1


SHOWN = tuple(1 << (i % 20 + 1) for i in range(120))
INDEX_OF_VOC = type(INDEX)(tuple(f"i{i}" for i in range(120)), SHOWN, "f" * 16)


@pytest.mark.parametrize("name", ["ewf+plop", "ewf+ewc", "ewf+nest+mib"])
def test_it_wraps_whatever_has_a_linear_classifier_and_resumes_with_the_same_bits(
    toy: Toy, in_tmp: Path, name: str
) -> None:
    import bench.testing.networks  # noqa: F401  # names the network "tiny"

    more = ["pretuning_epochs=1"] if "nest" in name else []
    settings = ['network="tiny"', "epochs=2", "first_epochs=1", "batch_size=4", "crop=32", *more]
    plan = make_plan([str(toy(then=2))], [name], overrides=settings)
    whole, broken = Store(in_tmp / "whole"), Store(in_tmp / "broken")
    session = train_all(plan, whole)
    with pytest.raises(KeyboardInterrupt):
        train_all(plan, broken, interrupted(2))
    train(plan, broken, list(plan.jobs)[-1])
    assert files(whole, plan) == files(broken, plan)
    assert session.method.penalties().keys() == ({"penalty"} if name == "ewf+ewc" else set())


def test_what_the_wrapped_method_leaves_is_there(in_tmp: Path) -> None:
    left = run_chain(in_tmp / "r", "ewf+pi", (2, 1), given_batches((2, 1), 2))[-1].state
    assert any(".score." in name for name in left), list(left)
