"""The networks a recipe can name, and how they are put together. Naming them needs no torch; building them does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from bench.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import nn

    from bench.models.abn import Norm
    from bench.models.classifier import Classifier
    from bench.models.network import Network

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


@dataclass(frozen=True)
class NetworkKind:
    """How a network is built.

    Attributes:
        body: (norm) -> body.
        head: (body, norm) -> head with an attribute out_channels.
        activated: its norms are activated batch norms (the MiB family); else batch norm and ReLU.
        weights: name of the body's weights in torchvision, or "" if it has none there.
        says: one line for people.
        mask_transformer: (channels, sizes) -> the mask transformer that belongs to a vision transformer; None for other bodies.
    """

    body: Callable[[Norm], nn.Module]
    head: Callable[[nn.Module, Norm], nn.Module]
    activated: bool
    says: str
    weights: str = ""
    mask_transformer: Callable[[int, Sequence[int]], Classifier] | None = None


def width_of(module: nn.Module) -> int:
    """Channels that a body or a head puts out; AttributeError for a module that does not say."""
    return cast(int, module.out_channels)


def _abn(name: str) -> NetworkKind:
    deep = name != "resnet18"
    widths = (256, 512, 1024, 2048) if deep else (64, 128, 256, 512)

    def body(norm: Norm) -> nn.Module:
        from bench.models.resnet import ResNetABN

        return ResNetABN(BLOCKS[name], widths, bottleneck=deep, norm=norm)

    says = f"DeepLab-v3 of the MiB family: {name} with activated batch norm, output stride 16"
    return NetworkKind(body, _aspp_abn, activated=True, weights=name, says=says)


def _aspp_abn(body: nn.Module, norm: Norm) -> nn.Module:
    from bench.models.heads import AsppABN

    return AsppABN(width_of(body), norm=norm)


def _torchvision(name: str, extra: bool = False) -> NetworkKind:
    def body(norm: Norm) -> nn.Module:
        from bench.models.resnet import TorchvisionResNet

        return TorchvisionResNet(name)

    def head(body: nn.Module, norm: Norm) -> nn.Module:
        from bench.models.heads import Aspp

        return Aspp(width_of(body), extra=extra)

    says = f"DeepLab-v3 of {'DKD and EIR' if extra else 'SSUL'}: torchvision's {name}, output stride 16"
    return NetworkKind(body, head, activated=False, weights=name, says=says)


def _small_body(norm: Norm) -> nn.Module:
    from bench.models.resnet import ResNetABN

    return ResNetABN((1, 1, 1, 1), (16, 32, 64, 96), bottleneck=False, stem="small", norm=norm)


def _small_head(body: nn.Module, norm: Norm) -> nn.Module:
    from bench.models.heads import AsppABN

    return AsppABN(width_of(body), hidden=48, out=64, dilations=(1, 2, 4), norm=norm)


def _segmenter_body(norm: Norm) -> nn.Module:
    from bench.models.vit import VisionTransformer

    return VisionTransformer(512, patch=16, width=768, n_blocks=12, n_heads=12)


def _small_vit_body(norm: Norm) -> nn.Module:
    from bench.models.vit import VisionTransformer

    return VisionTransformer(96, patch=8, width=64, n_blocks=2, n_heads=2, stem=(24, 48, 64), norm=norm)


def _segmenter_decoder(channels: int, sizes: Sequence[int]) -> Classifier:
    from bench.models.vit import MaskTransformer

    return MaskTransformer(channels, sizes, n_heads=12)


def _small_vit_decoder(channels: int, sizes: Sequence[int]) -> Classifier:
    from bench.models.vit import MaskTransformer

    # Class tokens as large as the patches'. The layer norm over a token of deviation 0.02 makes its gradient fifty times as large, which the
    # published learning rate allows for; at the small track's, also fifty times as large, the first update turns all patches into one direction.
    return MaskTransformer(channels, sizes, n_heads=2, token_std=1.0)


def _patch_tokens(body: nn.Module, norm: Norm) -> nn.Module:
    from bench.models.vit import PatchTokens

    return PatchTokens(width_of(body))


def _swin_b_body(norm: Norm) -> nn.Module:
    from bench.models.swin import Swin

    return Swin()


def _small_swin_body(norm: Norm) -> nn.Module:
    from bench.models.swin import Swin

    return Swin(width=32, depths=(2, 2), n_heads=(2, 4), window=6, drop_path=0.1)


NETWORKS: dict[str, NetworkKind] = {
    **{f"deeplab-abn-{name}": _abn(name) for name in BLOCKS},
    **{f"deeplab-{name}": _torchvision(name) for name in BLOCKS},
    **{f"deeplab-dkd-{name}": _torchvision(name, extra=True) for name in BLOCKS},
    "segmenter-vit-b16": NetworkKind(
        _segmenter_body, _patch_tokens, False, "ViT-B/16 for 512 pixels, as in Segmenter and MBS", "vit_b_16", _segmenter_decoder
    ),
    "deeplab-abn-swin-b": NetworkKind(
        _swin_b_body, _aspp_abn, True, "DeepLab-v3 of NeST on Swin-B (window 12); activated batch norm in the head, output stride 32"
    ),
    "small": NetworkKind(_small_body, _small_head, True, "DeepLab-v3 in small: four stages of one block, 0.37 M parameters, output stride 8"),
    "small-swin": NetworkKind(_small_swin_body, _small_head, True, "DeepLab-v3 in small on a Swin of two stages, 0.24 M parameters, output stride 8"),
    "small-vit": NetworkKind(
        _small_vit_body, _patch_tokens, True, "ViT in small: convolutional stem, two blocks of width 64, output stride 8", "", _small_vit_decoder
    ),
}


def _linear(channels: int, sizes: Sequence[int], kind: NetworkKind, norm: Norm) -> Classifier:
    from bench.models.classifier import LinearClassifier

    return LinearClassifier(channels, sizes)


def _conv_heads(channels: int, sizes: Sequence[int], kind: NetworkKind, norm: Norm) -> Classifier:
    from bench.models.classifier import ConvHeads

    return ConvHeads(channels, sizes, (lambda width: [norm(width)]) if kind.activated else None)


def _auxiliary(channels: int, sizes: Sequence[int], kind: NetworkKind, norm: Norm) -> Classifier:
    from bench.models.classifier import AuxiliaryClassifier

    return AuxiliaryClassifier(channels, sizes)


def _mask_transformer(channels: int, sizes: Sequence[int], kind: NetworkKind, norm: Norm) -> Classifier:
    assert kind.mask_transformer is not None
    return kind.mask_transformer(channels, sizes)


CLASSIFIERS: dict[str, Callable[[int, Sequence[int], NetworkKind, Norm], Classifier]] = {
    "linear": _linear,
    "conv-heads": _conv_heads,
    "auxiliary": _auxiliary,
    "mask-transformer": _mask_transformer,
}


def network_names() -> list[str]:
    """Every network a recipe can name."""
    return sorted(NETWORKS)


def check_network(name: str, classifier: str = "linear") -> None:
    """Raises UserError if there is no such network or classifier, or if the one cannot carry the other."""
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    if classifier not in CLASSIFIERS:
        raise unknown("classifier", classifier, CLASSIFIERS)
    if classifier == "mask-transformer" and NETWORKS[name].mask_transformer is None:
        able = ", ".join(other for other, kind in NETWORKS.items() if kind.mask_transformer)
        raise UserError(f"network = {name!r}: has no tokens for a mask transformer to read; allowed: {able}")


def torchvision_weights(name: str) -> str:
    """Name of a network's ImageNet weights in torchvision; "" if it has none there."""
    return NETWORKS[name].weights


def build_network(name: str, sizes: Sequence[int], classifier: str = "linear", norm: str = "abn") -> Network:
    """A freshly initialised network.

    Args:
        name: of NETWORKS.
        sizes: channels of each classifier head.
        classifier: of CLASSIFIERS.
        norm: "abn" or "inplace", for networks with activated batch norm.
    """
    check_network(name, classifier)
    from bench.models.abn import norm_builder
    from bench.models.network import Network

    kind, builder = NETWORKS[name], norm_builder(norm)
    body = kind.body(builder)
    head = kind.head(body, builder)
    return Network(body, head, CLASSIFIERS[classifier](width_of(head), sizes, kind, builder))
