"""torch that is imported when it is first used.

A login node plans, submits, watches and reports without torch, and `bench plan` reads every method file. So a
method file writes `from bench.lazy import F, torch` instead of importing torch itself; type checkers see the
real modules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    import torch.nn.functional as F
    from torch import nn as nn
else:

    class _Lazy:
        """Stands for a module until one of its attributes is asked for."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            value = getattr(importlib.import_module(self._name), attribute)
            setattr(self, attribute, value)
            return value

    torch = _Lazy("torch")
    F = _Lazy("torch.nn.functional")
    nn = _Lazy("torch.nn")


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, whatever the precision of the forward pass; float64 stays, for proofs."""
    return x if x.dtype == torch.float64 else x.float()


__all__ = ["F", "at_least_float32", "nn", "torch"]
