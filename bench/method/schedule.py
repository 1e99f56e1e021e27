"""Learning rates as pure functions of the iteration, and parameters in groups with rates of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bench.method.settings import Settings

if TYPE_CHECKING:
    from torch import nn

Rate = Callable[[float, int, int], float]
"""(learning rate of the group, iteration, iterations) -> learning rate of this update."""
Group = dict[str, Any]
"""A parameter group as torch's optimisers take it: "params", "lr", and what else the optimiser knows a group
to have."""


def learning_rate(
    base: float,
    iteration: int,
    total: int,
    policy: str = "poly",
    power: float = 0.9,
    min_lr: float = 0.0,
    warmup: float = 0,
    warmup_start: float = 1e-3,
) -> float:
    """The learning rate of one update.

    Args:
        base: learning rate of the parameter group.
        iteration: 0-based, within the phase.
        total: iterations of the phase.
        policy: "poly": base (1 - i/I)^power, not below `min_lr`; "warm-poly": the same times a linear rise
            from `warmup_start` to 1 over the first `warmup` iterations, no floor; "constant".
        power, min_lr, warmup, warmup_start: as above; `warmup` need not be a whole number.

    Source: spec/protocol.md section 7 (MiB), spec/ssul.md section 7, spec/eir.md section 3.
    """
    if policy == "constant":
        return base
    poly = base * max(0.0, 1 - iteration / total) ** power
    if policy == "poly":
        return max(poly, min_lr)
    if iteration >= warmup:
        return poly
    alpha = iteration / warmup
    return poly * (warmup_start * (1 - alpha) + alpha)


def scheduled(config: Settings) -> Rate:
    """The learning rate that some settings ask for."""

    def rate(base: float, iteration: int, total: int) -> float:
        warmup = config.warmup * total if config.warmup_rounding == "none" else int(config.warmup * total)
        return learning_rate(base, iteration, total, config.schedule, config.power, config.min_lr, warmup)

    return rate


def groups(
    network: nn.Module,
    lr: float,
    factors: Mapping[str, float] | None = None,
    no_decay: Callable[[str], bool] = lambda name: False,
) -> list[Group]:
    """The parameters that require a gradient, in groups for an optimiser.

    Args:
        network: whose parameters.
        lr: learning rate of a parameter that no prefix fits.
        factors: factor on it by prefix of the parameter's name ("body", "classifier.heads.0"); the longest
            that fits counts.
        no_decay: of a parameter's name: whether weight decay leaves it alone.

    Returns:
        One group a prefix, in the order of `factors`, then the rest; each divided into decayed parameters and
        those that are not ("weight_decay" 0). Empty groups are left out.
    """
    factors = factors or {}
    sorted_in: dict[tuple[str, bool], list[Any]] = {
        (p, spared): [] for p in (*factors, "") for spared in (False, True)
    }
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            fitting = [prefix for prefix in factors if name.startswith(f"{prefix}.") or name == prefix]
            sorted_in[max(fitting, key=len, default=""), no_decay(name)].append(parameter)
    found = []
    for (prefix, spared), parameters in sorted_in.items():
        if parameters:
            group: Group = {"params": parameters, "lr": lr * factors.get(prefix, 1.0)}
            found.append({**group, "weight_decay": 0.0} if spared else group)
    return found
