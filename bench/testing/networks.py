"""A network that weighs some kilobytes, for tests that train whole chains: import this module, then name it
"tiny"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.models.build import BODIES, NETWORKS, Assembled, BodyKind

if TYPE_CHECKING:
    from torch import nn

    from bench.models.abn import Norm

TINY = "tiny"


def _body(norm: Norm) -> nn.Module:
    from bench.models.resnet import ResNetABN

    return ResNetABN((1, 1, 1, 1), (4, 4, 4, 4), bottleneck=False, stem="small", norm=norm)


def _head(channels: int, norm: Norm) -> nn.Module:
    from bench.models.heads import AsppABN

    return AsppABN(channels, hidden=2, out=4, dilations=(1, 2, 4), norm=norm)


if TINY not in NETWORKS:
    BODIES.add(TINY, BodyKind("four stages of one block, 4 channels", _body))
    NETWORKS.add(TINY, Assembled("DeepLab-v3 of 4 channels, for tests", TINY, _head, activated=True))
