"""Networks, bodies and classifiers from outside: a method's file or a package adds its own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.method.registry import METHODS
from bench.models.build import (
    BODIES,
    CLASSIFIERS,
    NETWORKS,
    Assembled,
    BodyKind,
    ClassifierKind,
    aspp,
    build_network,
    check_network,
    network_names,
    patch_tokens,
    torchvision_weights,
)
from bench.models.classifier import Classifier, LinearClassifier
from bench.models.network import Network
from bench.models.weights import load_pretrained


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test adds is gone after it; what the methods' files add, once, when they are imported, stays."""
    METHODS.everything()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for registry in (BODIES, CLASSIFIERS, NETWORKS):
        for attribute in ("_added", "_loaded"):
            monkeypatch.setattr(registry, attribute, dict(getattr(registry, attribute)))
        monkeypatch.setattr(registry, "_found", None)


class Strided(nn.Module):
    """A body of one convolution."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.conv(images)
        return x, [x]


class Masks(nn.Module):
    """A network of another make: its output is a plain dictionary, and it knows no `Network`."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(sizes), 3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"masks": torch.einsum("bchw,nc->bnhw", images, self.embedding.weight)}


class MaskNetwork:
    """Its kind: it carries a classifier that nobody else knows."""

    says = "masks, each with a class"
    weights = ""

    def carries(self, classifier: str) -> bool:
        return classifier == "class-embedding"

    def build(self, sizes: Sequence[int], classifier: str, norm: str) -> nn.Module:
        return Masks(sizes)


class Cosine(LinearClassifier):
    """Like a linear one, but for the features' length."""

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(nn.functional.normalize(features, dim=1))


def cosine(channels: int, sizes: Sequence[int], network: Assembled, norm: object) -> Classifier:
    return Cosine(channels, sizes)


# ---- adding ------------------------------------------------------------------------------------------------


def test_a_body_and_a_network_of_ones_own_carry_every_classifier_that_fits() -> None:
    BODIES.add("strided", BodyKind("one convolution", lambda norm: Strided()))
    NETWORKS.add("mine", Assembled("a body of my own under the head of SSUL", "strided", aspp()))
    assert "mine" in network_names()
    assert torchvision_weights("mine") == ""
    for classifier in ("linear", "conv-heads", "auxiliary"):
        network = build_network("mine", [2, 3], classifier).eval()
        assert isinstance(network, Network)
        network.classifier.grow(1)
        assert network(torch.randn(1, 3, 32, 32)).logits.shape == (1, 6, 32, 32)
    with pytest.raises(UserError, match=r"network = 'mine': has no tokens"):
        build_network("mine", [2], "mask-transformer")


def test_a_classifier_of_ones_own_is_carried_by_the_networks_of_the_harness() -> None:
    CLASSIFIERS.add("cosine", ClassifierKind("a cosine classifier", cosine))
    network = build_network("small", [4, 2], "cosine")
    assert isinstance(network, Network)
    assert isinstance(network.classifier, Cosine)
    assert network.classifier.sizes == [4, 2]


def test_a_classifier_says_what_it_needs() -> None:
    def activated(network: Assembled) -> bool:
        return network.activated

    CLASSIFIERS.add("cosine", ClassifierKind("", cosine, fits=activated, needs="activated batch norm"))
    check_network("small", "cosine")
    words = "network = 'deeplab-resnet18': has no activated batch norm; allowed: deeplab-abn-.*small"
    with pytest.raises(UserError, match=words):
        check_network("deeplab-resnet18", "cosine")


def test_a_network_of_another_make() -> None:
    NETWORKS.add("masks", MaskNetwork())
    check_network("masks", "class-embedding")
    output = build_network("masks", [2, 1], "class-embedding")(torch.randn(1, 3, 8, 8))
    assert output["masks"].shape == (1, 3, 8, 8)
    words = "network = 'masks': does not carry the classifier 'linear'; allowed: deeplab-abn-"
    with pytest.raises(UserError, match=words):
        check_network("masks", "linear")
    words = "network = 'small': does not carry the classifier 'class-embedding'; allowed: masks$"
    with pytest.raises(UserError, match=words):
        check_network("small", "class-embedding")


def test_a_network_without_a_body_is_filled_as_a_whole(tmp_path: Path) -> None:
    NETWORKS.add("masks", MaskNetwork())
    network, other = (build_network("masks", [2, 1], "class-embedding") for _ in range(2))
    torch.save(other.state_dict(), tmp_path / "masks.pth")
    load_pretrained(network, "masks", str(tmp_path / "masks.pth"))
    assert torch.equal(network.state_dict()["embedding.weight"], other.state_dict()["embedding.weight"])


# ---- entry points ------------------------------------------------------------------------------------------


def offered(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Let an installed package offer a network under a name."""
    point = importlib.metadata.EntryPoint(name, value, "bench.networks")
    real = importlib.metadata.entry_points

    def entry_points(**of: str) -> object:
        return [point] if of == {"group": "bench.networks"} else real(**of)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_a_package_offers_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, "masks", f"{__name__}:THEIRS")
    check_network("masks", "class-embedding")
    assert isinstance(build_network("masks", [2], "class-embedding"), Masks)


THEIRS = MaskNetwork()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (f"{__name__}:MaskNetwork", "is a type; it must be an Assembled, or an object with says"),
        (f"{__name__}:not_there", "cannot be loaded: AttributeError"),
    ],
)
def test_what_is_no_network_is_an_error_for_who_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    offered(monkeypatch, "masks", value)
    check_network("small")
    with pytest.raises(UserError, match="has no tokens for a mask transformer to read; allowed: segmenter"):
        check_network("small", "mask-transformer")
    with pytest.raises(UserError, match=words):
        check_network("masks")


# ---- names -------------------------------------------------------------------------------------------------


def test_an_unknown_name_comes_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match="unknown network 'deeplab-resnet10'; did you mean 'deeplab-resnet101"
    ):
        build_network("deeplab-resnet10", [2])
    with pytest.raises(UserError, match="unknown classifier 'linaer'; did you mean 'linear'"):
        build_network("small", [2], "linaer")
    NETWORKS.add("mine", Assembled("", "smal-vit", patch_tokens))
    with pytest.raises(UserError, match="unknown body 'smal-vit'; did you mean 'small-vit'"):
        build_network("mine", [2])


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(UserError, match="network 'small': the name is taken by a built-in one"):
        NETWORKS.add("small", MaskNetwork())
    with pytest.raises(UserError, match="body 'swin-b': the name is taken"):
        BODIES.add("swin-b", BodyKind("", lambda norm: Strided()))
    with pytest.raises(UserError, match="classifier 'linear': the name is taken"):
        CLASSIFIERS.add("linear", ClassifierKind("", cosine))
    NETWORKS.add("small", NETWORKS.find("small"))  # the same thing again is no second one


def test_everything_is_described_and_every_network_has_its_body() -> None:
    for registry in (BODIES, CLASSIFIERS, NETWORKS):
        kinds, warnings = registry.everything()
        assert not warnings
        assert all(kind.says for kind in kinds.values())
    for kind in NETWORKS.everything()[0].values():
        assert isinstance(kind, Assembled)
        assert kind.body in BODIES


def test_naming_networks_needs_no_torch() -> None:
    code = """
import sys
from bench.models.build import NETWORKS, check_network, network_names, torchvision_weights
NETWORKS.everything()
check_network("small-vit", "mask-transformer")
assert [torchvision_weights(name) for name in network_names()]
assert not {"torch", "torchvision"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
