"""The networks a recipe can name, and how they are put together. Naming them needs no torch; building does.

A method's file or an installed package adds its own like the ones here:

    BODIES.add("my-body", BodyKind("a body of my own", build=lambda norm: MyBody()))
    NETWORKS.add("my-net", Assembled("my body under the head of SSUL", body="my-body", head=aspp()))

A network of quite another make, whose output may be no logits, is any object that `NetworkKind` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bench.errors import UserError
from bench.models.kinds import (
    BODIES,
    CLASSIFIERS,
    NETWORKS,
    Assembled,
    BodyKind,
    ClassifierKind,
    ClassTokens,
    NetworkKind,
    width_of,
)

if TYPE_CHECKING:
    from torch import nn

    from bench.models.abn import Norm
    from bench.models.classifier import Classifier

__all__ = [
    "BODIES",
    "CLASSIFIERS",
    "NETWORKS",
    "Assembled",
    "BodyKind",
    "ClassTokens",
    "ClassifierKind",
    "NetworkKind",
    "aspp",
    "aspp_abn",
    "build_network",
    "check_network",
    "network_names",
    "patch_tokens",
    "small_aspp_abn",
    "torchvision_weights",
    "width_of",
]

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}

# ---- asking ------------------------------------------------------------------------------------------------


def network_names() -> list[str]:
    """Every network a recipe can name."""
    return NETWORKS.known()


def check_network(name: str, classifier: str = "linear") -> None:
    """Raises UserError if there is no such network or classifier, or if the one cannot carry the other."""
    if _carries(NETWORKS.find(name), classifier):
        return
    kinds, _ = NETWORKS.everything()
    able = [other for other, kind in kinds.items() if _carries(kind, classifier)]
    # Only a network may know a classifier; a word that none knows is a slip.
    needs = CLASSIFIERS.find(classifier).needs if classifier in CLASSIFIERS or not able else ""
    lacking = f"has no {needs}" if needs else f"does not carry the classifier {classifier!r}"
    raise UserError(f"network = {name!r}: {lacking}; allowed: {', '.join(able) or 'none'}")


def _carries(kind: NetworkKind, classifier: str) -> bool:
    """Whether a network carries a classifier; not one that it does not know."""
    try:
        return kind.carries(classifier)
    except UserError:
        return False


def torchvision_weights(name: str) -> str:
    """Name of a network's ImageNet weights in torchvision; "" if it has none there."""
    return NETWORKS.find(name).weights


def build_network(
    name: str, sizes: Sequence[int], classifier: str = "linear", norm: str = "abn"
) -> nn.Module:
    """A freshly initialised network: a `bench.models.network.Network`, unless the name is of another make.

    Args:
        name: of NETWORKS.
        sizes: channels of each classifier head.
        classifier: of CLASSIFIERS.
        norm: "abn" or "inplace", for networks with activated batch norm.
    """
    check_network(name, classifier)
    return NETWORKS.find(name).build(sizes, classifier, norm)


# ---- heads -------------------------------------------------------------------------------------------------


def aspp(extra: bool = False) -> Callable[[int, Norm], nn.Module]:
    """The head of SSUL: torchvision's ASPP; with `extra` that of DKD and EIR."""

    def head(channels: int, norm: Norm) -> nn.Module:
        from bench.models.heads import Aspp

        return Aspp(channels, extra=extra)

    return head


def aspp_abn(channels: int, norm: Norm) -> nn.Module:
    """The head of the MiB family."""
    from bench.models.heads import AsppABN

    return AsppABN(channels, norm=norm)


def small_aspp_abn(channels: int, norm: Norm) -> nn.Module:
    """The head of the MiB family in small."""
    from bench.models.heads import AsppABN

    return AsppABN(channels, hidden=48, out=64, dilations=(1, 2, 4), norm=norm)


def patch_tokens(channels: int, norm: Norm) -> nn.Module:
    """No head: the classifier reads the body's patch tokens."""
    from bench.models.vit import PatchTokens

    return PatchTokens(channels)


# ---- bodies ------------------------------------------------------------------------------------------------


def _abn_resnet(name: str) -> BodyKind:
    deep = name != "resnet18"
    widths = (256, 512, 1024, 2048) if deep else (64, 128, 256, 512)

    def build(norm: Norm) -> nn.Module:
        from bench.models.resnet import ResNetABN

        return ResNetABN(BLOCKS[name], widths, bottleneck=deep, norm=norm)

    return BodyKind(f"{name} with activated batch norm, output stride 16", build, weights=name)


def _torchvision_resnet(name: str) -> BodyKind:
    def build(norm: Norm) -> nn.Module:
        from bench.models.resnet import TorchvisionResNet

        return TorchvisionResNet(name)

    return BodyKind(f"torchvision's {name}, output stride 16", build, weights=name)


def _small_resnet(norm: Norm) -> nn.Module:
    from bench.models.resnet import ResNetABN

    return ResNetABN((1, 1, 1, 1), (16, 32, 64, 96), bottleneck=False, stem="small", norm=norm)


def _vit_b16(norm: Norm) -> nn.Module:
    from bench.models.vit import VisionTransformer

    return VisionTransformer(512, patch=16, width=768, n_blocks=12, n_heads=12)


def _small_vit(norm: Norm) -> nn.Module:
    from bench.models.vit import VisionTransformer

    return VisionTransformer(96, patch=8, width=64, n_blocks=2, n_heads=2, stem=(24, 48, 64), norm=norm)


def _swin_b(norm: Norm) -> nn.Module:
    from bench.models.swin import Swin

    return Swin()


def _small_swin(norm: Norm) -> nn.Module:
    from bench.models.swin import Swin

    return Swin(width=32, depths=(2, 2), n_heads=(2, 4), window=6, drop_path=0.1)


# ---- classifiers -------------------------------------------------------------------------------------------


def _linear(channels: int, sizes: Sequence[int], network: Assembled, norm: Norm) -> Classifier:
    from bench.models.classifier import LinearClassifier

    return LinearClassifier(channels, sizes)


def _conv_heads(channels: int, sizes: Sequence[int], network: Assembled, norm: Norm) -> Classifier:
    from bench.models.classifier import ConvHeads

    return ConvHeads(channels, sizes, (lambda width: [norm(width)]) if network.activated else None)


def _foreground(channels: int, sizes: Sequence[int], network: Assembled, norm: Norm) -> Classifier:
    from bench.models.classifier import ForegroundClassifier

    return ForegroundClassifier(channels, sizes)


def _auxiliary(channels: int, sizes: Sequence[int], network: Assembled, norm: Norm) -> Classifier:
    from bench.models.classifier import AuxiliaryClassifier

    return AuxiliaryClassifier(channels, sizes)


def _mask_transformer(channels: int, sizes: Sequence[int], network: Assembled, norm: Norm) -> Classifier:
    from bench.models.vit import MaskTransformer

    assert network.tokens is not None
    return MaskTransformer(channels, sizes, n_heads=network.tokens.n_heads, token_std=network.tokens.std)


def _has_tokens(network: Assembled) -> bool:
    return network.tokens is not None


# ---- what the harness brings -------------------------------------------------------------------------------

for _name in BLOCKS:
    BODIES.add(f"abn-{_name}", _abn_resnet(_name))
    BODIES.add(_name, _torchvision_resnet(_name))
BODIES.add("vit-b16", BodyKind("ViT-B/16 for 512 pixels", _vit_b16, weights="vit_b_16"))
BODIES.add("swin-b", BodyKind("Swin-B with windows of 12, output stride 32", _swin_b))
BODIES.add(
    "small-resnet", BodyKind("four stages of one block, activated batch norm, output stride 8", _small_resnet)
)
BODIES.add("small-vit", BodyKind("convolutional stem, two blocks of width 64, output stride 8", _small_vit))
BODIES.add("small-swin", BodyKind("Swin of two stages, output stride 8", _small_swin))

CLASSIFIERS.add("linear", ClassifierKind("a 1x1 convolution a step (MiB, PLOP, NeST)", _linear))
CLASSIFIERS.add(
    "conv-heads", ClassifierKind("a head of two convolutions a block of classes (SSUL)", _conv_heads)
)
CLASSIFIERS.add(
    "foreground", ClassifierKind("1x1 convolutions without a background channel (STAR)", _foreground)
)
CLASSIFIERS.add(
    "auxiliary",
    ClassifierKind("1x1 convolutions behind an auxiliary one of a single channel (DKD, EIR)", _auxiliary),
)
CLASSIFIERS.add(
    "mask-transformer",
    ClassifierKind(
        "class tokens that attend to the patches (Segmenter, MBS)",
        _mask_transformer,
        fits=_has_tokens,
        needs="tokens for a mask transformer to read",
    ),
)

for _name in BLOCKS:
    _deeplab = "DeepLab-v3 of {}: {}, output stride 16"
    _abn = f"{_name} with activated batch norm"
    _theirs = f"torchvision's {_name}"
    NETWORKS.add(
        f"deeplab-abn-{_name}",
        Assembled(_deeplab.format("the MiB family", _abn), f"abn-{_name}", aspp_abn, activated=True),
    )
    NETWORKS.add(f"deeplab-{_name}", Assembled(_deeplab.format("SSUL", _theirs), _name, aspp()))
    NETWORKS.add(
        f"deeplab-dkd-{_name}", Assembled(_deeplab.format("DKD and EIR", _theirs), _name, aspp(extra=True))
    )
NETWORKS.add(
    "segmenter-vit-b16",
    Assembled(
        "ViT-B/16 for 512 pixels, as in Segmenter and MBS",
        "vit-b16",
        patch_tokens,
        tokens=ClassTokens(12, std=0.02),
    ),
)
NETWORKS.add(
    "deeplab-abn-swin-b",
    Assembled(
        "DeepLab-v3 of NeST on Swin-B (window 12); activated batch norm in the head, output stride 32",
        "swin-b",
        aspp_abn,
        activated=True,
    ),
)
NETWORKS.add(
    "small",
    Assembled(
        "DeepLab-v3 in small: four stages of one block, 0.37 M parameters, output stride 8",
        "small-resnet",
        small_aspp_abn,
        activated=True,
    ),
)
NETWORKS.add(
    "small-swin",
    Assembled(
        "DeepLab-v3 in small on a Swin of two stages, 0.24 M parameters, output stride 8",
        "small-swin",
        small_aspp_abn,
        activated=True,
    ),
)
NETWORKS.add(
    "small-vit",
    # Class tokens as large as the patches'. The layer norm over a token of deviation 0.02 makes its gradient
    # fifty times as large, which the published learning rate allows for; at the small track's, also fifty
    # times as large, the first update turns all patches into one direction.
    Assembled(
        "ViT in small: convolutional stem, two blocks of width 64, output stride 8",
        "small-vit",
        patch_tokens,
        activated=True,
        tokens=ClassTokens(2, std=1.0),
    ),
)
