"""Chains of jobs on batches that are given, for tests that compute the same chain straight on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import bench.testing.networks  # names the network "tiny"
from bench.data.index import ClassIndex
from bench.method.registry import method
from bench.plan.make import make_plan
from bench.store.results import Store
from bench.testing.tensors import GivenImages, TensorBatch, tensor_data, tensor_protocol
from bench.train import session
from bench.train.job import publish
from bench.train.session import Session
from bench.train.tensors import read_tensors

COMMON = (
    'network="tiny"',
    'precision="fp64"',
    "epochs=1",
    "first_epochs=1",
    "batch_size=2",
    "crop=32",
    "lr=0.02",
    "first_lr=0.05",
)
assert bench.testing.networks.TINY == "tiny"


@dataclass
class Done:
    """A step as the engine did it.

    Attributes:
        opened: the network when the job was open and nothing had begun.
        batches: what it trained on.
        losses: terms of each iteration.
        weights: what it published.
        state: what it hands on beside the weights.
    """

    opened: nn.Module
    batches: list[TensorBatch]
    losses: list[dict[str, float]]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]


def given_batches(sizes: Sequence[int], iterations: int = 3, side: int = 32) -> list[list[TensorBatch]]:
    """Batches of two random images for each step, labelled as that step labels them: background, its own
    classes (in blocks of 4 pixels), and void."""
    generator, steps = torch.Generator().manual_seed(0), []
    for t in range(len(sizes)):
        first, there = (1 if t == 0 else sum(sizes[:t])), sum(sizes[: t + 1])
        batches: list[TensorBatch] = []
        for _ in range(iterations):
            images = torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)
            known = torch.tensor([0, *range(first, there), 255])
            blocks = torch.randint(len(known), (2, side // 4, side // 4), generator=generator)
            labels = known[blocks].repeat_interleave(4, 1).repeat_interleave(4, 2)
            batches.append({"images": images, "labels": labels})
        steps.append(batches)
    return steps


def run_chain(
    folder: Path,
    name: str,
    sizes: Sequence[int],
    batches: Sequence[list[TensorBatch]],
    overrides: Sequence[str] = (),
    watch: Callable[[Session], None] = lambda _: None,
    setting: str = "overlapped",
) -> list[Done]:
    """Each step planned, opened, trained and published by the engine in `folder`."""
    protocol = tensor_protocol(sizes, setting=setting)
    shows = [1 << group[0] for group, own in zip(protocol.groups, batches, strict=True) for _ in 2 * own]
    split = ClassIndex(tuple(f"image {i}" for i in range(len(shows))), tuple(shows), "0" * 16)
    indexes = {protocol.dataset.name: {"train": split, "test": split}}
    plan = make_plan([protocol], [name], "small", overrides=[*COMMON, *overrides], indexes=indexes)
    store, done = Store(str(folder)), []
    store.make()
    test = torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, 32, 32, dtype=torch.uint8)
    cpu = mock.patch.object(session, "device_of_this_process", return_value=torch.device("cpu"))
    for index, key in enumerate(plan.chains[0].keys):
        record = plan.record(key)
        config = method(record.method).config(**record.settings).at(index)
        earlier = GivenImages((), tuple(batches[index - 1]) if index else ())
        data = tensor_data(protocol, index, config, batches[index], test, candidates=earlier)
        store.open_work(record, fresh=True)
        with cpu, session.open_job(record, store, data) as opened:
            before = copy.deepcopy(opened.method.network)
            watch(opened)
            opened.train()
            publish(opened, opened.test())
        lines = (store.artifact(key) / "train.jsonl").read_text().splitlines()
        about = ("phase", "epoch", "iteration", "lr")
        losses = [{k: v for k, v in json.loads(line).items() if k not in about} for line in lines]
        weights, state = (
            read_tensors(store.artifact(key) / f"{what}.safetensors")[0] for what in ("model", "state")
        )
        done.append(Done(before, batches[index], losses, weights, state))
    return done


def mib_losses(logits: Tensor, old: Tensor, labels: Tensor, weight: float) -> dict[str, Tensor]:
    """MiB's two losses, from probabilities.

    Source: spec/mib-family.md section 2.2 and section 2.6.
    """
    n, p = old.shape[1], logits.softmax(1)
    q = torch.cat([p[:, :n].sum(1, keepdim=True), p[:, n:]], dim=1)
    valid = labels != 255
    target = torch.where(valid & (labels >= n), labels - n + 1, 0)
    ce = -(q.gather(1, target[:, None])[:, 0].log() * valid).sum() / labels.numel()
    merged = torch.cat([p[:, :1] + p[:, n:].sum(1, keepdim=True), p[:, 1:n]], dim=1)
    kd = -(old.softmax(1) * merged.log()).sum() / (labels.numel() * n)
    return {"ce": ce, "kd": weight * kd}


def cross_entropy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy over all pixels, void in the divisor."""
    valid = labels != 255
    log_p = logits.log_softmax(1).gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    return {"ce": -(log_p * valid).sum() / labels.numel()}


def fit(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[TensorBatch],
    lr: float,
    losses: Callable[[Tensor, TensorBatch], dict[str, Tensor]],
) -> list[dict[str, float]]:
    """SGD with Nesterov momentum 0.9, decay 1e-4, poly 0.9. Returns the loss terms of each iteration."""
    sgd = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    found = []
    network.train()
    for i, batch in enumerate(batches):
        sgd.param_groups[0]["lr"] = lr * (1 - i / len(batches)) ** 0.9
        terms = losses(network(batch["images"]).logits, batch)
        network.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        sgd.step()
        found.append({name: term.item() for name, term in terms.items()})
    return found
