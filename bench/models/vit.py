"""A vision transformer as body, and Segmenter's mask transformer as a classifier that grows by class tokens.

Parameter names of the body are timm's (cls_token, pos_embed, patch_embed.proj, blocks.0.attn.qkv …), so its
checkpoints fit.

Source: spec/mbs.md section 1; Dosovitskiy et al., ICLR 2021 (ViT); Strudel et al., ICCV 2021 (Segmenter).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.lazy import at_least_float32
from bench.models.abn import ActivatedBatchNorm, Norm
from bench.models.classifier import Classifier

INIT_STD = 0.02
"""Of the truncated normal that linear layers, tokens and position embeddings start from."""


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D]; `qkv` puts out (3, heads, D / heads)."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        width: D of the tokens [B, N, D].
        n_heads: of the attention.
        hidden: width inside the MLP.
        drop_path: chance that an image skips the attention, and again the MLP, in training; what is left is
            scaled up to the same mean.
    """

    def __init__(self, width: int, n_heads: int, hidden: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, n_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._kept(self.attn(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _kept(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


def initialise_linear(module: nn.Module) -> None:
    """Truncated normal weights and zero biases for every linear layer."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=INIT_STD)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens [B, h w, D] as a map [B, D, h, w]; a view."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """A learned position embedding on another grid of patches.

    Args:
        embedding: [1, 1 + g g, D], the class token's first.
        grid: (rows, columns) wanted.
        mode: "bilinear" (as the network does for images of another size) or "bicubic" (as checkpoints are
            loaded); corners not aligned.

    Returns:
        [1, 1 + rows columns, D].
    """
    side = math.isqrt(embedding.shape[1] - 1)
    if (side, side) == tuple(grid):
        return embedding
    map_ = tokens_to_map(embedding[:, 1:], (side, side))
    patches = F.interpolate(map_, size=grid, mode=mode, align_corners=False)
    return torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbedding(nn.Module):
    """Images [B, 3, H, W] as tokens [B, h w, D].

    Args:
        patch: side of a patch.
        width: D.
        stem: none: non-overlapping patches, as published. Else the widths of 3x3 convolutions of stride 2,
            which learn from a few hundred images what patches do not (Xiao et al., NeurIPS 2021), before a
            1x1 convolution. The norm behind it centres the tokens: what all have in common is where the first
            updates of a mask transformer push them, out of which they come back slowly if at all.
        norm: of the stem.
    """

    def __init__(
        self, patch: int, width: int, stem: Sequence[int] = (), norm: Norm = ActivatedBatchNorm
    ) -> None:
        super().__init__()
        if not stem:
            self.proj: nn.Module = nn.Conv2d(3, width, patch, stride=patch)
            return
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, *stem)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), norm(after)]
        layers += [nn.Conv2d(stem[-1], width, 1, bias=False), norm(width, activation="identity")]
        self.proj = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT encoder: images [B, 3, H, W] to the map of its patch tokens, and that map after each block.

    Maps are [B, D, H / patch, W / patch].

    Args:
        image_size: side of the images that the position embedding is laid out for; it is resized bilinearly
            for others.
        patch: side of a patch in pixels.
        width: D.
        n_blocks, n_heads: of the transformer.
        hidden: width inside the MLPs; 4 D if None.
        stem: widths of a convolutional stem instead of the patches' projection; with n of them `patch` is 2
            to the n.
        norm: of the stem.

    LayerNorm's epsilon is PyTorch's 1e-5, where timm's ViT has 1e-6: MBS's doing. No dropout.
    """

    def __init__(
        self, image_size: int, patch: int, width: int, n_blocks: int, n_heads: int, hidden: int | None = None,
        stem: Sequence[int] = (), norm: Norm = ActivatedBatchNorm,
    ) -> None:  # fmt: skip
        super().__init__()
        self.multiple = self.patch = patch
        self.side = image_size // patch
        self.out_channels = width
        self.patch_embed = PatchEmbedding(patch, width, stem, norm)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.side**2, width))
        self.blocks = nn.ModuleList([Block(width, n_heads, hidden or 4 * width) for _ in range(n_blocks)])
        self.norm = nn.LayerNorm(width)
        initialise_linear(self)
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)

    def tokens(self, images: Tensor) -> list[Tensor]:
        """Tokens [B, 1 + h w, D], the class token first: after each block, and last after the final norm."""
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)
        x = x + resize_position_embedding(self.pos_embed, self.grid(images), "bilinear")
        stages = []
        for block in self.blocks:
            x = block(x)
            stages.append(x)
        return [*stages, self.norm(x)]

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches of images."""
        return images.shape[-2] // self.patch, images.shape[-1] // self.patch

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        *maps, out = [tokens_to_map(tokens[:, 1:], self.grid(images)) for tokens in self.tokens(images)]
        return out, maps

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of timm's or torchvision's ViT with the keys of this body.

        Its position embedding is resized to this grid (bicubic).
        """
        adapted = {torchvision_to_timm(key): value for key, value in state.items()}
        embedding = adapted.get("pos_embed")
        if embedding is not None and embedding.ndim == 3 and _is_square(embedding.shape[1] - 1):
            wide = at_least_float32(embedding)
            adapted["pos_embed"] = resize_position_embedding(wide, (self.side, self.side), "bicubic")
        return adapted


def _is_square(n: int) -> bool:
    return math.isqrt(n) ** 2 == n


def torchvision_to_timm(key: str) -> str:
    """The name timm gives a tensor of torchvision's ViT; other names stay."""
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed"}
    key = re.sub(r"^conv_proj\.", "patch_embed.proj.", names.get(key, key))
    key = re.sub(r"^encoder\.ln\.", "norm.", key)
    key = re.sub(r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1.", key)
    key = re.sub(r"\.self_attention\.out_proj\.", ".attn.proj.", key)
    key = re.sub(r"\.self_attention\.in_proj_", ".attn.qkv.", key)
    key = re.sub(r"\.mlp\.(0|linear_1)\.", ".mlp.fc1.", re.sub(r"\.mlp\.(3|linear_2)\.", ".mlp.fc2.", key))
    return re.sub(r"\.ln_(\d)\.", r".norm\1.", key)


class PatchTokens(nn.Identity):
    """The head of a network whose classifier reads the body's patch tokens as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


# ---- the mask transformer ----------------------------------------------------------------------------------


def mask_norm(masks: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5) -> Tensor:
    """Masks normalised over the classes: (x - mean) / (std + eps), std unbiased; then scale and shift.

    It couples all classes: a new class changes the logits of the old ones.

    Args:
        masks: [B, N, C].
        scale, shift: [C].

    Source: spec/mbs.md section 1.
    """
    centred = masks - masks.mean(dim=-1, keepdim=True)
    return centred / (masks.std(dim=-1, keepdim=True) + eps) * scale + shift


class ClassTokens(nn.Module):
    """The tokens [1, n, D] of a block of classes, and their scale and shift of the mask norm [n]."""

    def __init__(self, width: int, n: int, std: float) -> None:
        super().__init__()
        self.tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, n, width), std=std))
        self.scale = nn.Parameter(torch.ones(n))
        self.shift = nn.Parameter(torch.zeros(n))


class MaskTransformer(Classifier):
    """Segmenter's decoder: patches and class tokens attend to each other.

    A class's mask is its token's similarity to each patch.

    Args:
        channels: of the patch tokens, as a map [B, d, h, w].
        sizes: class tokens of each head.
        n_heads: of the attention.
        width: D inside; `channels` if None.
        n_blocks: transformer blocks.
        hidden: width inside the MLPs; 4 D if None.
        drop_path: of the last block, rising to it linearly from 0 in the first.
        token_std: of the truncated normal that class tokens start from.

    `forward` returns the masks [B, C, h, w] and, for distillation, "patches" [B, h w, D] and "class_features"
    [B, C, D] (projected, not yet normalised), and "class_tokens" [B, C, D], the parameters as they enter.

    Source: spec/mbs.md section 1.
    """

    def __init__(
        self, channels: int, sizes: Sequence[int] = (), n_heads: int = 12, width: int | None = None,
        n_blocks: int = 2, hidden: int | None = None, drop_path: float = 0.1, token_std: float = INIT_STD,
    ) -> None:  # fmt: skip
        self.width, self.token_std = width or channels, token_std
        super().__init__(channels, sizes)
        w = self.width
        rates = torch.linspace(0, drop_path, n_blocks, device="cpu").tolist()
        self.proj_dec = nn.Linear(channels, w)
        self.blocks = nn.ModuleList([Block(w, n_heads, hidden or 4 * w, rate) for rate in rates])
        self.decoder_norm = nn.LayerNorm(w)
        self.proj_patch = nn.Parameter(w**-0.5 * torch.randn(w, w))
        self.proj_classes = nn.Parameter(w**-0.5 * torch.randn(w, w))
        initialise_linear(self)

    def new_head(self, size: int) -> nn.Module:
        return ClassTokens(self.width, size, self.token_std)

    @property
    def sizes(self) -> list[int]:
        return [head.tokens.shape[1] for head in self.heads]

    def _joined(self, name: str, dim: int) -> Tensor:
        """A parameter of all heads, in the order of the steps."""
        return torch.cat([getattr(head, name) for head in self.heads], dim=dim)

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        class_tokens = self._joined("tokens", 1).expand(len(features), -1, -1)
        x = torch.cat([self.proj_dec(features.flatten(2).transpose(1, 2)), class_tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        n_patches = x.shape[1] - class_tokens.shape[1]
        patches, classes = self.decoder_norm(x).split([n_patches, class_tokens.shape[1]], dim=1)
        patches, classes = patches @ self.proj_patch, classes @ self.proj_classes
        masks = F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2)
        # At least float32 under autocast too: in half precision, where the released code has it, a deviation
        # over few classes is mostly rounding.
        masks = mask_norm(at_least_float32(masks), self._joined("scale", 0), self._joined("shift", 0))
        extra = {"patches": patches, "class_features": classes, "class_tokens": class_tokens}
        return tokens_to_map(masks, (features.shape[-2], features.shape[-1])), extra
