"""ResNet bodies: the MiB family's (activated batch norm, all of the last stage dilated) and torchvision's.

Every body maps images [B, 3, H, W] to (features, maps): its output for the head, and one feature map a stage
for distillation. In the MiB family a stage's map is the sum of its last block before the leaky ReLU (PLOP's
"attention" maps).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.abn import SLOPE, ActivatedBatchNorm, Norm

STEM = ("conv1", "bn1", "relu", "maxpool")
"""Of torchvision's ResNet, before its stages."""


class ResidualBlock(nn.Module):
    """A basic (two 3x3) or bottleneck (1x1, 3x3, 1x1) block; stride and dilation sit on the (first) 3x3.

    Args:
        in_channels: of the input.
        channels: output channels of each convolution: two for a basic block, three for a bottleneck.

    Source: spec/protocol.md section 6.
    """

    def __init__(
        self, in_channels: int, channels: Sequence[int], stride: int = 1, dilation: int = 1,
        norm: Norm = ActivatedBatchNorm,
    ) -> None:  # fmt: skip
        super().__init__()
        kernels = [3, 3] if len(channels) == 2 else [1, 3, 1]
        first3 = kernels.index(3)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        previous = in_channels
        for k, (kernel, width) in enumerate(zip(kernels, channels, strict=True)):
            spread = dilation if kernel == 3 else 1
            step, padding = stride if k == first3 else 1, spread if kernel == 3 else 0
            layers[f"conv{k + 1}"] = nn.Conv2d(previous, width, kernel, step, padding, spread, bias=False)
            last = k == len(kernels) - 1
            layers[f"bn{k + 1}"] = norm(width, activation="identity" if last else "leaky_relu")
            previous = width
        self.convs = nn.Sequential(layers)
        if stride != 1 or in_channels != channels[-1]:
            self.proj_conv = nn.Conv2d(in_channels, channels[-1], 1, stride=stride, bias=False)
            self.proj_bn = norm(channels[-1], activation="identity")

    def before_activation(self, x: Tensor) -> Tensor:
        """The sum of both paths, before the leaky ReLU."""
        # The shortcut first: in-place norms overwrite what they are given, which must still be whole here.
        shortcut = self.proj_bn(self.proj_conv(x)) if hasattr(self, "proj_conv") else x
        return shortcut + self.convs(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.before_activation(x), SLOPE)


class ResNetABN(nn.Module):
    """The ResNet of in-place ABN, with the names of its checkpoints (mod1.conv1, mod2.block1.convs.conv1 …).

    Args:
        blocks: number of blocks in each stage.
        widths: output channels of each stage.
        bottleneck: bottleneck blocks (middle width a quarter) instead of basic ones.
        strides, dilations: of each stage; a stage's dilation holds in every block, its stride in the first.
        stem: "imagenet" (7x7 stride 2, max-pool stride 2) or "small" (3x3 stride 2).
    """

    steady = True
    """With frozen norms the same in training and in evaluation."""

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        bottleneck: bool,
        strides: Sequence[int] = (1, 2, 2, 1),
        dilations: Sequence[int] = (1, 1, 1, 2),
        stem: str = "imagenet",
        norm: Norm = ActivatedBatchNorm,
    ) -> None:
        super().__init__()
        previous = 64 if stem == "imagenet" else widths[0]
        kernel = 7 if stem == "imagenet" else 3
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = nn.Conv2d(3, previous, kernel, stride=2, padding=kernel // 2, bias=False)
        layers["bn1"] = norm(previous)
        if stem == "imagenet":
            layers["pool1"] = nn.MaxPool2d(3, stride=2, padding=1)
        self.mod1 = nn.Sequential(layers)
        for stage, (n, width) in enumerate(zip(blocks, widths, strict=True)):
            channels = [width // 4, width // 4, width] if bottleneck else [width, width]
            modules: OrderedDict[str, nn.Module] = OrderedDict()
            for b in range(n):
                stride = strides[stage] if b == 0 else 1
                modules[f"block{b + 1}"] = ResidualBlock(previous, channels, stride, dilations[stage], norm)
                previous = width
            self.add_module(f"mod{stage + 2}", nn.Sequential(modules))
        self.out_channels = previous
        self.n_stages = len(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.mod1(x)
        maps = []
        for stage in range(self.n_stages):
            *inner, last = self.get_submodule(f"mod{stage + 2}").children()
            assert isinstance(last, ResidualBlock)
            for block in inner:
                x = block(x)
            summed = last.before_activation(x)
            maps.append(summed)
            x = F.leaky_relu(summed, SLOPE)
        return x, maps

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of in-place ABN as it is, one of torchvision's ResNet with the keys of this body."""
        return torchvision_to_abn(state) if "conv1.weight" in state else dict(state)


class TorchvisionResNet(nn.Module):
    """torchvision's ResNet at output stride 16, as SSUL and DKD use it; batch-norm momentum 0.01.

    torchvision's dilation leaves the first block of the last stage undilated, unlike the MiB family. Maps are
    stage outputs.

    Args:
        name: of torchvision's, for example "resnet50".
        network: one of torchvision's make in other sizes, as it is, instead of that.
    """

    steady = True
    """With frozen norms the same in training and in evaluation."""

    def __init__(self, name: str, network: nn.Module | None = None) -> None:
        super().__init__()
        theirs: Any = _dilated(name) if network is None else network
        self.stem = nn.Sequential(OrderedDict((part, getattr(theirs, part)) for part in STEM))
        self.layer1, self.layer2 = theirs.layer1, theirs.layer2
        self.layer3, self.layer4 = theirs.layer3, theirs.layer4
        self.out_channels = [m for m in theirs.layer4.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.01

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(x)
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return x, maps

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's checkpoint with the keys of this body: what lies before the stages is its stem."""
        return {re.sub(r"^(conv1|bn1)\.", r"stem.\1.", key): value for key, value in state.items()}


def _dilated(name: str) -> nn.Module:
    """torchvision's ResNet of that name at output stride 16, without weights."""
    import torchvision

    deep = name in ("resnet50", "resnet101")
    dilated = {"replace_stride_with_dilation": [False, False, True]} if deep else {}
    network: nn.Module = getattr(torchvision.models, name)(weights=None, **dilated)
    if not deep:  # basic blocks: torchvision cannot dilate them itself
        layer4: Any = network.layer4
        layer4[0].conv1.stride = layer4[0].downsample[0].stride = (1, 1)
        for conv in (layer4[0].conv2, layer4[1].conv1, layer4[1].conv2):
            conv.dilation = conv.padding = (2, 2)
    return network


def torchvision_to_abn(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's ResNet keys as those of the MiB family's body.

    The norms' scale |gamma| + eps stands where torchvision's is gamma: every negative gamma changes sign
    here, and the epsilon (1e-5) is far below the precision of the weights.
    """
    out = {}
    for key, value in state.items():
        match = re.match(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.(\d))\.(.*)", key)
        if match:
            stage, block, kind, number, down, rest = match.groups()
            prefix = f"mod{int(stage) + 1}.block{int(block) + 1}."
            shortcut = "proj_conv." if down == "0" else "proj_bn."
            out[prefix + (f"convs.{kind}{number}." if kind else shortcut) + rest] = value
        elif key.startswith(("conv1.", "bn1.")):
            out["mod1." + key] = value
    return out
