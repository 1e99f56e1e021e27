"""Learning rates as pure functions of the iteration."""

from __future__ import annotations


def learning_rate(
    base: float,
    iteration: int,
    total: int,
    policy: str = "poly",
    power: float = 0.9,
    min_lr: float = 0.0,
    warmup: int = 0,
    warmup_start: float = 1e-3,
) -> float:
    """The learning rate of one update.

    Args:
        base: learning rate of the parameter group.
        iteration: 0-based, within the phase.
        total: iterations of the phase.
        policy: "poly": base (1 - i/I)^power, not below `min_lr`; "warm-poly": the same times a linear rise from `warmup_start`
            to 1 over the first `warmup` iterations, no floor; "constant".
        power, min_lr, warmup, warmup_start: as above.

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
