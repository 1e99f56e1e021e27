"""DKD: what its classifier offers, what a step leaves untouched, its test rule, and DKD-M's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import images_of, memory_of
from plans import config_of

import bench
from bench.method.registry import method
from bench.models.abn import norm_layers
from bench.models.build import build_network
from bench.models.classifier import AuxiliaryClassifier
from bench.plan.make import make_plan
from bench.protocol.file import load
from bench.store.results import Store
from bench.train.tensors import read_tensors
from methods import dkd

Toy = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def train(protocol: Path, name: str, settings: list[str]) -> list[Path]:
    """Artifact folders of the steps of a method."""
    run = bench.run(str(protocol), [name], cluster="inline", set=settings, results="results")
    assert run.outcome.ok
    return [Store("results").artifact(key) for key in run.plan.chains[0].keys]


def test_a_logit_is_its_positive_and_its_negative_part_and_the_bias() -> None:
    classifier = AuxiliaryClassifier(6, [1, 3, 2])
    logits, parts = classifier(torch.randn(2, 6, 4, 4))
    bias = torch.cat([head.bias for head in classifier.heads[1:]]).view(1, -1, 1, 1)
    assert logits.shape == (2, 6, 4, 4)
    torch.testing.assert_close(parts["positive"] + parts["negative"] + bias, logits[:, 1:])


def test_the_auxiliary_loss_never_reaches_the_features() -> None:
    features = torch.randn(2, 6, 4, 4, requires_grad=True)
    classifier = AuxiliaryClassifier(6, [1, 3])
    logits, _ = classifier(features)
    dkd.auxiliary_bce(logits).sum().backward()
    assert features.grad is None or not features.grad.any()
    auxiliary: Any = classifier.heads[0]
    assert auxiliary.weight.grad.any()


def test_background_and_void_are_negatives_of_the_new_classes() -> None:
    logits = torch.zeros(1, 4, 1, 3).index_fill_(1, torch.tensor([3]), -20.0)
    good = dkd.new_class_bce(logits, torch.tensor([[[0, 255, 2]]]), 1)
    assert good.shape == (1,)
    assert good < 1e-6
    assert dkd.new_class_bce(logits, torch.tensor([[[0, 255, 3]]]), 1) > 5


def test_background_is_where_no_class_exceeds_one_half() -> None:
    logits = torch.tensor([[9.0, -1.0, -2.0], [9.0, 0.0, -2.0], [-9.0, 0.1, 0.2]]).T.reshape(1, 3, 1, 3)
    assert dkd.predict_foreground_threshold(logits).tolist() == [[[0, 0, 2]]]


def test_pseudo_labels_for_the_memory_look_at_classes_only() -> None:
    logits = torch.tensor([[9.0, 3.0, -3.0], [9.0, 2.0, -3.0], [-9.0, 3.0, 4.0], [9.0, 3.0, 4.0]]).T.reshape(
        1, 3, 1, 4
    )
    labels = torch.tensor([[[0, 0, 0, 255]]])
    assert dkd.foreground_pseudo_labels(logits, labels, 0.9).tolist() == [[[1, 0, 2, 255]]]


def test_a_later_step_leaves_norms_alone_and_starts_from_the_auxiliary_classifier(
    toy: Toy, quick: list[str]
) -> None:
    first, second = (
        read_tensors(folder / "model.safetensors")[0]
        for folder in train(toy(then=2), "dkd", [*quick, "lr=1e-12"])
    )
    norms = [
        f"{name}."
        for name, module in build_network("small", [1, 2], "auxiliary").named_modules()
        if module in norm_layers(module)
    ]
    assert len(norms) > 10
    assert all(
        torch.equal(value, second[key]) for key, value in first.items() if key.startswith(tuple(norms))
    )
    for part in ("weight", "bias"):
        new, auxiliary = second[f"classifier.heads.2.{part}"], first[f"classifier.heads.0.{part}"]
        torch.testing.assert_close(new, auxiliary.expand_as(new), rtol=0, atol=1e-6)


def test_everything_but_the_norms_learns_and_the_body_slower(toy: Toy, quick: list[str]) -> None:
    protocol = toy(then=2)
    moved = {}
    for body_lr in (0.1, 0.0):
        first, second = (
            read_tensors(f / "model.safetensors")[0]
            for f in train(protocol, "dkd", [*quick, f"body_lr={body_lr}"])
        )
        moved[body_lr] = {key for key, value in first.items() if not torch.equal(value, second[key])}
    convolutions = {"body.mod1.conv1.weight", "body.mod5.block1.convs.conv2.weight"}
    learned = {"head.red_conv.weight", "classifier.heads.0.weight", "classifier.heads.1.weight"}
    assert moved[0.1] >= convolutions | learned
    assert moved[0.0] >= learned
    assert not moved[0.0] & convolutions


def test_only_the_newest_classifier_decays(toy: Toy, quick: list[str]) -> None:
    spec = method("dkd")
    config = spec.config(network="small", crop=32, lr=0.02, body_lr=0.1, weight_decay=0.5)
    protocol = load(toy(then=2))
    for index, sizes in ((0, [1, 2]), (1, [1, 2, 2])):
        built = spec.build(config)
        built.step, built.network = protocol.step(index), build_network("small", sizes, "auxiliary")
        built.training_images = lambda: None  # type: ignore[attr-defined]  # no data in this test
        built.setup()
        decay = {
            id(p): group.get("weight_decay", config.weight_decay)
            for group in built.parameter_groups()
            for p in group["params"]
        }
        assert sum(len(group["params"]) for group in built.parameter_groups()) == len(decay)
        newest = {id(p) for p in built.network.classifier.heads[-1].parameters()}
        norms = {id(p) for norm in norm_layers(built.network) for p in norm.parameters()}
        every = {id(p) for p in built.network.parameters()}
        if index:
            assert decay == {p: 0.5 if p in newest else 0.0 for p in every - norms}
        else:
            assert decay == dict.fromkeys(every, 0.5)


@pytest.mark.parametrize("name", ["small", "deeplab-dkd-resnet18"])
def test_later_steps_drop_no_feature_and_keep_the_norms_statistics(toy: Toy, name: str) -> None:
    spec, protocol = method("dkd"), load(toy(then=2))
    network = build_network(name, [1, 2, 2], "auxiliary")
    for index in (0, 1):
        built = spec.build(spec.config())
        built.step, built.network = protocol.step(index), network
        built.train_mode()
        images = torch.randn(2, 3, 64, 64)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        twice = [network(images).logits for _ in range(2)]
        assert torch.equal(*twice) == (index == 1 or name == "small")  # the small network has no dropout
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items()) == (
            index == 1
        )


def test_dkd_m_draws_a_memory_that_is_labelled_with_the_new_classes_only(toy: Toy, quick: list[str]) -> None:
    protocol = toy(n_classes=4, images=32, first=2, then=1)
    first, second, third = train(protocol, "dkd@m", [*quick, "memory_size=6"])
    images = images_of(protocol)
    memories = [memory_of(folder) for folder in (first, second, third)]
    assert [len(memory) for memory in memories] == [0, 6, 6]
    assert set(memories[1]) <= set(images[0])
    assert set(memories[2]) <= set(memories[1]) | set(images[1])
    iterations = len((second / "train.jsonl").read_text().splitlines())
    assert iterations == (len(images[1]) + 6) // 4  # one epoch is one pass over both


def test_a_memory_of_dkd_m_larger_than_the_images_holds_them_all(toy: Toy, quick: list[str]) -> None:
    protocol = toy(n_classes=4, images=20, then=2)
    folder = train(protocol, "dkd@m", [*quick, "memory_size=1000", "augmentation=resize-scale-crop"])[-1]
    memory = memory_of(folder)
    images = images_of(protocol)
    assert sorted(memory) == sorted(images[0])
    assert len((folder / "train.jsonl").read_text().splitlines()) == (len(images[1]) + len(memory)) // 4


def test_dkd_and_dkd_m_share_step_0(toy: Toy) -> None:
    plan = make_plan([str(toy())], ["dkd", "dkd@m"], overrides=["batch_size=4"])
    plain, memory = (chain.keys for chain in plan.chains)
    assert plain[0] == memory[0]
    assert not set(plain[1:]) & set(memory[1:])


def test_published_settings() -> None:
    voc, ade = (config_of("dkd", name) for name in ("voc-15-1", "ade-100-10"))
    assert (voc.first_lr, voc.lr, voc.body_lr, voc.first_body_lr, voc.epochs, voc.batch_size) == (
        0.01,
        0.001,
        0.1,
        0.1,
        60,
        32,
    )
    assert (voc.first_pos_weight, voc.pos_weight, voc.memory_size) == (2, 1, 0)
    assert (ade.first_lr, ade.lr, ade.epochs, ade.batch_size, ade.schedule, ade.warmup) == (
        0.025,
        0.0025,
        100,
        24,
        "warm-poly",
        0.2,
    )
    assert (ade.first_pos_weight, ade.pos_weight) == (35, 35)
    assert config_of("dkd", "voc-5-3").batch_size == 32
    assert config_of("dkd@m", "voc-15-1").memory_size == 100
    assert config_of("dkd@m", "ade-100-10").memory_size == 300
