from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.errors import UserError
from bench.models.abn import ActivatedBatchNorm, norm_layers
from bench.models.build import build_network
from bench.models.resnet import ResNetABN
from bench.models.weights import load_pretrained

WANTED = "the package inplace-abn: python tests/install_inplace_abn.py"
inplace_abn = pytest.importorskip("inplace_abn", reason=WANTED)


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_the_published_networks() -> None:
    """spec/protocol.md section 6, spec/ssul.md section 4: counted on the original code."""
    mib: Any = build_network("deeplab-abn-resnet101", [16, 1])
    assert n_parameters(mib.body) == 42_500_160
    assert n_parameters(mib.head) == 15_535_104
    assert n_parameters(mib.classifier) == 257 * 17
    ssul: Any = build_network("deeplab-resnet101", [1, 1, 15], "conv-heads")
    assert n_parameters(ssul.body) == 42_500_160
    assert n_parameters(ssul.head) == 15_535_104
    assert n_parameters(ssul.classifier) == 3 * 590_336 + 257 * 17


@pytest.mark.parametrize(
    "name", ["deeplab-abn-resnet18", "deeplab-resnet18", "deeplab-dkd-resnet18", "small"]
)
def test_outputs_have_the_documented_shapes(name: str) -> None:
    network: Any = build_network(name, [4, 2]).eval()
    out = network(torch.randn(2, 3, 64, 64))
    assert out.logits.shape == (2, 6, 64, 64)
    assert out.small_logits.shape[:2] == (2, 6)
    assert len(out.maps) == 4
    assert out.features.shape[1] == network.classifier.channels
    stride = 8 if name == "small" else 16
    assert out.body.shape[-1] == 64 // stride


def test_the_last_stage_is_dilated_in_every_block_of_the_mib_family_but_not_in_torchvisions_first() -> None:
    ours: Any = build_network("deeplab-abn-resnet50", [2])
    assert [block.convs.conv2.dilation for block in ours.body.mod5.children()] == [(2, 2)] * 3
    theirs: Any = build_network("deeplab-resnet50", [2])
    assert [block.conv2.dilation for block in theirs.body.layer4.children()] == [(1, 1), (2, 2), (2, 2)]


def test_a_classifier_grows_and_keeps_what_it_knows() -> None:
    network: Any = build_network("small", [4]).eval()
    x = torch.randn(1, 3, 32, 32)
    before = network(x).logits
    network.classifier.grow(2)
    after = network(x).logits
    assert network.classifier.sizes == [4, 2]
    assert torch.equal(after[:, :4], before)


@pytest.mark.parametrize("activation", ["leaky_relu", "identity"])
def test_activated_batch_norm_equals_the_package(activation: str) -> None:
    """Outputs, running statistics and gradients of inplace_abn.InPlaceABN, also where gamma is negative."""
    torch.manual_seed(0)
    ours = ActivatedBatchNorm(5, activation)
    theirs = inplace_abn.InPlaceABN(5, activation=activation, activation_param=0.01)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(5))
        ours.bias.copy_(torch.randn(5))
    theirs.load_state_dict(ours.state_dict())
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(3, 5, 7, 7)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out_a, out_b = ours(a * 1.0), theirs(b * 1.0)
        torch.testing.assert_close(out_a, out_b, rtol=1e-4, atol=1e-5)
        if training:
            cotangent = torch.randn_like(x)
            out_a.backward(cotangent)
            out_b.backward(cotangent)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_a_whole_network_with_the_package_gives_the_same_numbers() -> None:
    """In double precision: in single, an activation whose sign is mostly rounding can flip a gradient."""
    torch.manual_seed(0)
    plain = build_network("deeplab-abn-resnet18", [4], norm="abn").double()
    inplace = build_network("deeplab-abn-resnet18", [4], norm="inplace").double()
    inplace.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (True, False):
        plain.train(training)
        inplace.train(training)
        a, b = plain(x.clone()), inplace(x.clone())
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a.maps[1], b.maps[1], rtol=1e-6, atol=1e-6)
    plain.train()(x).logits.square().mean().backward()
    inplace.train()(x.clone()).logits.square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), inplace.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        scale = float(p.grad.abs().max()) + 1e-6
        assert float((p.grad - q.grad).abs().max()) < 1e-5 * scale, name


def test_norm_layers_are_found_whatever_their_kind() -> None:
    plain, inplace = (norm_layers(build_network("small", [2], norm=norm)) for norm in ("abn", "inplace"))
    assert len(plain) == len(inplace) > 8


def checkpoint_of(body: nn.Module) -> dict[str, torch.Tensor]:
    state = body.state_dict()
    drawn = {key: torch.randn_like(value) for key, value in state.items() if value.is_floating_point()}
    return {f"module.{key}": value for key, value in {**state, **drawn}.items()}


def test_an_in_place_abn_checkpoint_is_loaded_with_and_without_its_prefix(tmp_path: Path) -> None:
    network: Any = build_network("deeplab-abn-resnet18", [4])
    state = checkpoint_of(network.body)
    extra = {"module.classifier.fc.weight": torch.zeros(3), "module.classifier.fc.bias": torch.zeros(3)}
    torch.save({"state_dict": {**state, **extra}, "epoch": 3}, tmp_path / "prefixed.pth.tar")
    torch.save({key.removeprefix("module."): value for key, value in state.items()}, tmp_path / "plain.pth")
    for name in ("prefixed.pth.tar", "plain.pth"):
        fresh: Any = build_network("deeplab-abn-resnet18", [4])
        load_pretrained(fresh, "deeplab-abn-resnet18", str(tmp_path / name))
        for key, value in fresh.body.state_dict().items():
            assert torch.equal(value, state[f"module.{key}"]), key


def test_torchvision_weights_fit_both_families(tmp_path: Path) -> None:
    """The file torchvision would fetch, made here: a state dict of its ResNet."""
    import torchvision

    torch.manual_seed(0)
    reference = torchvision.models.resnet18(weights=None)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    for name in ("deeplab-resnet18", "deeplab-abn-resnet18"):
        network: Any = build_network(name, [4])
        load_pretrained(network, name, str(tmp_path / "resnet18.pth"))
        first = "stem" if name == "deeplab-resnet18" else "mod1"
        assert torch.equal(network.body.state_dict()[f"{first}.conv1.weight"], reference.conv1.weight)
    assert isinstance(network.body, ResNetABN)
    body: Any = network.body
    shortcut = body.state_dict()["mod5.block1.proj_conv.weight"]
    assert torch.equal(shortcut, reference.layer4[0].downsample[0].weight)
    # With the same activation the two bodies agree up to the stage where their dilations differ.
    x = torch.randn(1, 3, 64, 64)
    reference.eval()
    body.eval()
    stem = nn.functional.leaky_relu(reference.bn1(reference.conv1(x)), 0.01)
    torch.testing.assert_close(body.mod1.conv1(x), reference.conv1(x))
    torch.testing.assert_close(body.mod1.bn1(body.mod1.conv1(x)), stem, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "cannot be read"),
        (
            lambda path: torch.save({"state_dict": {"module.mod1.conv1.weight": torch.zeros(2)}}, path),
            "tensors are missing",
        ),
    ],
)
def test_unusable_weights_are_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(UserError) as caught:
        load_pretrained(build_network("deeplab-abn-resnet18", [4]), "deeplab-abn-resnet18", str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_cut_off_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    network: Any = build_network("deeplab-abn-resnet18", [4])
    torch.save(checkpoint_of(network.body), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match="cannot be read"):
        load_pretrained(build_network("deeplab-abn-resnet18", [4]), "deeplab-abn-resnet18", str(path))
