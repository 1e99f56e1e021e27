"""Swin as a body for dense prediction: windows of attention that shift from block to block.

Parameter names are those of the public Swin backbone for dense prediction (patch_embed.proj, norm0,
layers.0.blocks.0.attn.qkv …), so its checkpoints fit. torchvision's Swin cannot stand in for it: it stops
shifting where a map is no larger than a window, has no norm behind each stage, and names its parameters
otherwise.

Source: spec/nest.md section 7; Liu et al., ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from bench.models.vit import INIT_STD, MLP, initialise_linear

MASKED = -100.0
"""Added to the score of two tokens that share a window only because the map was rolled."""


def padded(x: Tensor, multiple: int) -> Tensor:
    """A map [B, H, W, C] with zeros on the right and below, up to sides that `multiple` divides."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -width % multiple, 0, -height % multiple))


def to_windows(x: Tensor, window: int) -> Tensor:
    """A map [B, H, W, C] cut into windows [B, n, window^2, C]."""
    b, height, width, c = x.shape
    x = x.view(b, height // window, window, width // window, window, c)
    return x.transpose(2, 3).reshape(b, -1, window * window, c)


def from_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """Windows [B, n, window^2, C] put together to the map [B, H, W, C]."""
    x = x.view(len(x), height // window, width // window, window, window, -1)
    return x.transpose(2, 3).reshape(len(x), height, width, -1)


def shift_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """What keeps apart the tokens of a rolled map that are no neighbours in the image.

    Returns:
        0 or MASKED for each pair of tokens of each window, [n, window^2, window^2].
    """
    shift = window // 2
    bands = [torch.arange(side, device=device) for side in (height, width)]
    after = [torch.stack([band >= len(band) - by for by in (window, shift)]) for band in bands]
    rows, columns = (passed.sum(0) for passed in after)
    region = to_windows((3 * rows[:, None] + columns)[None, :, :, None], window)[0, :, :, 0]
    return (region[:, :, None] != region[:, None, :]) * MASKED


class WindowAttention(nn.Module):
    """Self-attention inside each window, with a learned bias for each relative position.

    Args:
        width: C of the tokens.
        window: side of a window.
        n_heads: of the attention.
    """

    relative_position_index: Tensor

    def __init__(self, width: int, window: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        table = torch.empty((2 * window - 1) ** 2, n_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=INIT_STD))
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        down, right = (at[:, None] - at[None, :] + window - 1).unbind(-1)
        self.register_buffer("relative_position_index", down * (2 * window - 1) + right, persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Windows [B, n, N, C] to the same; `mask` [n, N, N] is added to the scores."""
        b, n, tokens, width = x.shape
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        bias = (bias if mask is None else bias + mask[:, None]).expand(n, -1, -1, -1).flatten(0, 1)
        # Windows count as heads: the bias of all windows is then one tensor, the same for every image.
        q, k, v = self.qkv(x).view(b, n, tokens, 3, self.n_heads, -1).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(y.view(b, n, self.n_heads, tokens, -1).transpose(2, 3).reshape(b, n, tokens, width))


class SwinBlock(nn.Module):
    """A pre-norm block over a map [B, H, W, C]; a shifted one's windows begin half a window right and down.

    The map is padded after the first norm, so zeros take part in the attention, and a shifted block shifts
    whatever the map's size.

    Args:
        width, n_heads, window: of the attention.
        shifted: every second block of a stage.
        mlp_ratio: width inside the MLP over `width`.
        drop_path: chance that an image skips the attention, and again the MLP, in training.
    """

    def __init__(
        self, width: int, n_heads: int, window: int, shifted: bool, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, window, n_heads)
        self.drop_path = StochasticDepth(drop_path, "row")
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention inside the (shifted) windows of a map."""
        height, width = x.shape[1:3]
        x = padded(x, self.window).roll((-self.shift, -self.shift), (1, 2))
        windows = self.attn(to_windows(x, self.window), mask if self.shift else None)
        y = from_windows(windows, self.window, *x.shape[1:3])
        return y.roll((self.shift, self.shift), (1, 2))[:, :height, :width]


class PatchMerging(nn.Module):
    """Each 2 x 2 of tokens becomes one: [B, H, W, C] to [B, H / 2, W / 2, 2 C], odd sides padded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = padded(x, 2)
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merging that leads to the next (None in the last stage)."""

    def __init__(
        self, width: int, n_heads: int, window: int, mlp_ratio: float, drop_paths: Sequence[float], last: bool
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            [
                SwinBlock(width, n_heads, window, b % 2 == 1, mlp_ratio, drop)
                for b, drop in enumerate(drop_paths)
            ]
        )
        self.downsample = None if last else PatchMerging(width)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (side + -side % self.window for side in x.shape[1:3])
        mask = shift_mask(height, width, self.window, x.device) if len(self.blocks) > 1 else None
        for block in self.blocks:
            x = block(x, mask)
        return x


class PatchEmbedding(nn.Module):
    """Patches of images [B, 3, H, W], padded to whole ones, as a normed map [B, h, w, C]."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        bottom, right = (-side % self.patch for side in images.shape[-2:])
        return self.norm(self.proj(F.pad(images, (0, right, 0, bottom))).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """Swin transformer: images [B, 3, H, W] to the last stage's map, and the maps of the stages before it.

    Each map is behind a norm of its own.

    Args:
        width: C of the first stage; each further one doubles it and halves the sides.
        depths: blocks of each stage.
        n_heads: of each stage.
        window: side of a window.
        patch: side of a patch in pixels.
        mlp_ratio: width inside the MLPs over the tokens'.
        drop_path: of the last block, rising to it linearly from 0 in the first.
    """

    def __init__(
        self, width: int = 128, depths: Sequence[int] = (2, 2, 18, 2),
        n_heads: Sequence[int] = (4, 8, 16, 32), window: int = 12, patch: int = 4,
        mlp_ratio: float = 4.0, drop_path: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = PatchEmbedding(patch, width)
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        widths = [width * 2**i for i in range(len(depths))]
        self.layers = nn.ModuleList(
            [
                SwinStage(w, heads, window, mlp_ratio, [next(rates) for _ in range(depth)], w == widths[-1])
                for w, heads, depth in zip(widths, n_heads, depths, strict=True)
            ]
        )
        for i, w in enumerate(widths):
            self.add_module(f"norm{i}", nn.LayerNorm(w))
        self.out_channels = widths[-1]
        initialise_linear(self)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(images)
        maps = []
        for i, stage in enumerate(self.layers):
            assert isinstance(stage, SwinStage)
            x = stage(x)
            maps.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps[-1], maps[:-1]

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of the image classifier; norms behind stages, which it has not, stay as they are."""
        stage_norms = {key: value for key, value in self.state_dict().items() if key.startswith("norm")}
        return {**stage_norms, **state}
