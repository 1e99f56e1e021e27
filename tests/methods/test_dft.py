"""DFT*: a chain of three steps against the same chain computed straight on; what it predicts and shares."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chains import given_batches, run_chain

from bench.method.registry import method
from bench.protocol.file import load

SIZES = (3, 2, 1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def test_three_steps_are_those_of_the_specification(in_tmp: Path) -> None:
    """Losses of every iteration, and all weights and running statistics after each step.

    Source: spec/dft-star.md section 1.
    """
    chain = run_chain(in_tmp / "r", "dft", SIZES, given_batches(SIZES))
    network = chain[0].opened
    heads = [f"classifier.heads.{i}." for i in range(3)]
    assert [len(network.get_parameter(f"{head}bias")) for head in heads] == list(SIZES)
    for t, (done, lr) in enumerate(zip(chain, (0.05, 0.02, 0.02), strict=True)):
        learn = [p for name, p in network.named_parameters() if not t or name.startswith(tuple(heads[t:]))]
        network.train(t == 0)
        momenta, found = [torch.zeros_like(p) for p in learn], []
        for i, batch in enumerate(done.batches):
            z, y = network(batch["images"]).logits, batch["labels"]
            assert z.shape[1] == sum(SIZES)
            log_p = z - z.exp().sum(1, keepdim=True).log()
            valid = y != 255
            loss = -(log_p.gather(1, torch.where(valid, y, 0)[:, None])[:, 0] * valid).sum() / y.numel()
            found.append(loss.item())
            rate = lr * (1 - i / 3) ** 0.9
            with torch.no_grad():
                for p, v, g in zip(learn, momenta, torch.autograd.grad(loss, learn), strict=True):
                    g = g + 1e-4 * p
                    v.mul_(0.9).add_(g)
                    p.sub_(rate * (g + 0.9 * v))
        assert [terms["ce"] for terms in done.losses] == pytest.approx(found, rel=1e-9)
        state = network.state_dict()
        assert set(state) == set(done.weights)
        for name, weight in done.weights.items():
            torch.testing.assert_close(weight, state[name], rtol=1e-8, atol=1e-11, msg=f"{t} {name}")


def test_a_class_to_come_is_never_predicted() -> None:
    built = method("dft").build(method("dft").config())
    built.step = load("voc-15-1").step(1)
    logits = torch.zeros(1, 21, 2, 2)
    logits[:, 17:] = 5.0
    logits[:, 16, 0] = 1.0
    assert built.predict(SimpleNamespace(logits=logits), (2, 2)).tolist() == [[[16, 16], [0, 0]]]


@pytest.mark.parametrize(
    ("task", "index"), [("voc-15-1", 0), ("voc-15-1", 3), ("voc-15-5", 0), ("voc-15-5", 1)]
)
def test_every_step_has_the_channels_of_the_whole_protocol(task: str, index: int) -> None:
    built, protocol = method("dft").build(method("dft").config()), load(task)
    built.step, built.later = protocol.step(index), protocol.groups[index + 1 :]
    sizes = [protocol.step(t).n_new for t in range(index + 1)]
    whole = [protocol.step(t).n_new for t in range(len(protocol.groups))]
    assert built.heads(sizes) == built.heads(sizes[:-1] or sizes) == whole
