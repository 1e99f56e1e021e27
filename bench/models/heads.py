"""DeepLab-v3 heads (ASPP): from the body's output to the features that the classifiers read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.abn import SLOPE, ActivatedBatchNorm, Norm


def global_pooling(x: Tensor, training: bool, pooling_size: int = 32) -> Tensor:
    """Image-level features of x [B, C, H, W], one a pixel.

    In training the mean over the map. In evaluation a sliding mean with a window of `pooling_size` (at most
    the map), stride 1, replicated back to H x W; on a map of that size the two agree.
    """
    h, w = x.shape[-2:]
    if training:
        return x.mean((2, 3), keepdim=True).expand(-1, -1, h, w)
    rows, columns = min(pooling_size, h), min(pooling_size, w)
    pooled = F.avg_pool2d(x, (rows, columns), stride=1)
    left, top = (columns - 1) // 2, (rows - 1) // 2
    return F.pad(pooled, (left, columns - 1 - left, top, rows - 1 - top), mode="replicate")


class AsppABN(nn.Module):
    """The MiB family's ASPP: four branches, concatenated, and an image-level branch that is added.

    Args:
        in_channels: of the body's output [B, C, h, w].
        hidden, out: channels of a branch, and of the output.
        dilations: of the three 3x3 branches.
        pooling_size: window of the image-level branch in evaluation.

    Source: spec/protocol.md section 6 (MiB; the same in PLOP and NeST).
    """

    def __init__(
        self, in_channels: int, hidden: int = 256, out: int = 256, dilations: Sequence[int] = (6, 12, 18),
        pooling_size: int = 32, norm: Norm = ActivatedBatchNorm,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pooling_size = pooling_size
        self.out_channels = out
        self.map_convs = nn.ModuleList(
            [nn.Conv2d(in_channels, hidden, 1, bias=False)]
            + [nn.Conv2d(in_channels, hidden, 3, padding=d, dilation=d, bias=False) for d in dilations]
        )
        self.map_bn = norm(hidden * 4)
        self.global_pooling_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.global_pooling_bn = norm(hidden)
        self.red_conv = nn.Conv2d(hidden * 4, out, 1, bias=False)
        self.pool_red_conv = nn.Conv2d(hidden, out, 1, bias=False)
        self.red_bn = norm(out)
        gain = math.sqrt(2 / (1 + SLOPE**2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.map_bn(torch.cat([conv(x) for conv in self.map_convs], dim=1))
        # The image-level branch is computed on what pooling leaves, then spread: the two 1x1 convolutions see
        # no neighbours.
        if self.training:
            pooled = self.global_pooling_bn(self.global_pooling_conv(x.mean((2, 3), keepdim=True)))
        else:
            windows = global_pooling(x, False, self.pooling_size)
            pooled = self.global_pooling_bn(self.global_pooling_conv(windows))
        return self.red_bn(self.red_conv(branches) + self.pool_red_conv(pooled))


class Aspp(nn.Module):
    """torchvision's ASPP with dropout 0.1, as SSUL uses it; DKD has one more 3x3 convolution (`extra`).

    Source: spec/ssul.md section 4, spec/eir.md section 1.
    """

    def __init__(
        self, in_channels: int, out: int = 256, dilations: Sequence[int] = (6, 12, 18), extra: bool = False
    ) -> None:
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import ASPP

        self.aspp = ASPP(in_channels, list(dilations), out)
        self.aspp.project[-1].p = 0.1
        self.extra: nn.Module = nn.Identity()
        if extra:
            wide = nn.Conv2d(out, out, 3, padding=1, bias=False)
            self.extra = nn.Sequential(wide, nn.BatchNorm2d(out), nn.ReLU())
        self.out_channels = out
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.after_dropout(self.before_dropout(x))

    def before_dropout(self, x: Tensor) -> Tensor:
        """The first part: with frozen norms the same in training and in evaluation."""
        branches = torch.cat([conv(x) for conv in self.aspp.convs], dim=1)
        out: Tensor = self.aspp.project[:-1](branches)
        return out

    def after_dropout(self, x: Tensor) -> Tensor:
        """Dropout, and what comes after it."""
        return self.extra(self.aspp.project[-1](x))


def kaiming(module: nn.Module) -> None:
    """Kaiming normal (fan in, gain sqrt 2) for every convolution's weight; biases keep PyTorch's default."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
