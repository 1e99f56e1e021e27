"""Double precision goes through every network, and heads grow in the precision of those before them."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.lazy import at_least_float32
from bench.models.build import build_network
from bench.models.network import Network, upsample

SMALL = [
    ("small", "linear"),
    ("small", "conv-heads"),
    ("small", "auxiliary"),
    ("small-swin", "linear"),
    ("small-swin", "conv-heads"),
    ("small-vit", "linear"),
    ("small-vit", "mask-transformer"),
    ("deeplab-resnet18", "conv-heads"),
    ("deeplab-dkd-resnet18", "auxiliary"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def built(name: str, classifier: str) -> Network:
    network = build_network(name, [1, 4], classifier)
    assert isinstance(network, Network)
    return network


def test_at_least_float32_widens_and_never_cuts() -> None:
    assert at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        assert at_least_float32(x) is x


def test_upsampled_logits_keep_double_precision() -> None:
    logits = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    assert upsample(logits, (12, 12)).dtype == torch.float64
    assert upsample(logits.half(), (12, 12)).dtype == torch.float32


@pytest.mark.parametrize(("name", "classifier"), SMALL)
def test_a_network_in_double_precision(name: str, classifier: str) -> None:
    """Nothing on the way is cut to float32: perturbations far below its epsilon still change the logits."""
    single = built(name, classifier).eval()
    double = copy.deepcopy(single).double()
    images = torch.randn(1, 3, 96, 96)
    output = double(images.double())
    tensors = [output.logits, output.small_logits, output.body, output.features, *output.maps]
    assert {t.dtype for t in [*tensors, *output.extra.values()]} == {torch.float64}
    torch.testing.assert_close(output.logits.float(), single(images).logits, rtol=1e-3, atol=1e-3)
    nudged = double(images.double() + 1e-12).logits
    assert 0 < float((nudged - output.logits).detach().abs().max()) < 1e-7


@pytest.mark.parametrize(("name", "classifier"), SMALL)
def test_training_in_double_precision(name: str, classifier: str) -> None:
    network = built(name, classifier).double().train()
    network(torch.randn(2, 3, 96, 96, dtype=torch.float64)).logits.square().mean().backward()
    assert {p.grad.dtype for p in network.parameters() if p.grad is not None} == {torch.float64}


@pytest.mark.parametrize(("name", "classifier"), SMALL)
def test_a_head_grown_in_double_precision_is_the_one_grown_in_single(name: str, classifier: str) -> None:
    single = built(name, classifier)
    double = copy.deepcopy(single).double()
    for network in (single, double):
        torch.manual_seed(1)
        network.classifier.grow(2)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert double.classifier.sizes == [1, 4, 2]
    for (key, a), b in zip(single.state_dict().items(), double.state_dict().values(), strict=True):
        assert torch.equal(a.double(), b.double()), key
    assert double.eval()(torch.randn(1, 3, 96, 96, dtype=torch.float64)).logits.shape[1] == 7


@pytest.mark.parametrize(("name", "classifier"), SMALL)
def test_a_head_grown_elsewhere_lies_where_the_others_are(name: str, classifier: str) -> None:
    network = built(name, classifier).to("meta")
    network.classifier.grow(2)
    assert {t.device.type for t in network.state_dict().values()} == {"meta"}
