"""Activated batch norm, as in-place ABN computes it, in plain PyTorch.

In-place ABN (Rota Bulò, Porzi, Kontschieder, CVPR 2018) scales by |gamma| + eps, which plain batch norm does
not; a network that loads its weights must do the same. The package `inplace-abn` is the memory-saving drop-in
with the same numbers (norm="inplace").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench.distributed import summed_with_gradient
from bench.errors import UserError
from bench.lazy import at_least_float32

SLOPE = 0.01
"""Of the leaky ReLU, everywhere in the MiB family."""


class ActivatedBatchNorm(nn.Module):
    """y = act((|gamma| + eps) (x - mean) / sqrt(var + eps) + beta), with statistics over all processes.

    Args:
        channels: C of the input [B, C, H, W].
        activation: "leaky_relu" or "identity".
        slope: of the leaky ReLU.
        eps, momentum: of the statistics; the running variance is the unbiased one.

    Source: spec/protocol.md section 6.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, channels: int, activation: str = "leaky_relu", slope: float = SLOPE, eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation, self.slope, self.eps, self.momentum = activation, slope, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs() + self.eps
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            y = self._synchronised(x, scale)
        else:
            statistics = self.running_mean, self.running_var
            y = F.batch_norm(x, *statistics, scale, self.bias, self.training, self.momentum, self.eps)
        return F.leaky_relu(y, self.slope) if self.activation == "leaky_relu" else y

    def _synchronised(self, x: Tensor, scale: Tensor) -> Tensor:
        """Batch statistics over all processes; gradients flow as on one device with the whole batch."""
        wide, channels, shape = at_least_float32(x), x.shape[1], (1, -1, 1, 1)
        count = wide.new_full((1,), x.numel() // channels)
        total = summed_with_gradient(torch.cat([wide.sum((0, 2, 3)), count]))
        n = total[-1].detach()
        mean = total[:channels] / n
        centred = wide - mean.view(shape)
        variance = summed_with_gradient(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        y = centred * (torch.rsqrt(variance + self.eps) * scale).view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, activation={self.activation}"


Norm = Callable[..., nn.Module]
"""Builds a norm from (channels, activation="leaky_relu")."""


def norm_builder(name: str) -> Norm:
    """The norm of a network: "abn" (plain PyTorch) or "inplace" (inplace-abn: the same in less memory)."""
    if name == "abn":
        return ActivatedBatchNorm
    if name != "inplace":
        raise UserError(f"norm: {name!r}; allowed: abn, inplace")
    try:
        import inplace_abn
    except ImportError:
        cure = "pip install --no-build-isolation inplace-abn (or use norm = 'abn', same numbers)"
        raise UserError(f"norm = 'inplace' needs the package inplace-abn: {cure}") from None

    def build(channels: int, activation: str = "leaky_relu") -> nn.Module:
        several = dist.is_initialized() and dist.get_world_size() > 1
        kind = inplace_abn.InPlaceABNSync if several else inplace_abn.InPlaceABN
        more = {"group": dist.group.WORLD} if several else {}
        return kind(channels, activation=activation, activation_param=SLOPE, **more)

    return build


def norm_layers(module: nn.Module) -> list[nn.Module]:
    """Every norm with running statistics: batch norms, activated or not, in place or not."""
    return [m for m in module.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
