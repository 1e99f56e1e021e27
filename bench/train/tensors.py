"""Tensors on disk: safetensors files that appear whole or not at all. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.errors import UserError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Any = None) -> None:
    """Write tensors, and JSON values beside them, as one file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    flat = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    save_file(flat, aside, metadata={"values": json.dumps(values)})
    aside.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """(tensors, JSON values) of a file that `write_tensors` wrote.

    Raises:
        UserError: missing, cut off or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; delete the folder {path.parent} and run the same command again")
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get("values", "null"))
            return {name: file.get_tensor(name) for name in file.offset_keys()}, values
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: cut off or damaged ({error}); delete the folder {path.parent} and run the same command "
            "again"
        ) from None


def scoped(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under names that begin with `prefix` and a dot."""
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def unscoped(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix` and a dot, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A method's state as (tensors, JSON values)."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def split_optimiser(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimiser's state dict as (JSON values, tensors named "<parameter>.<name>"); of any of torch's
    optimisers."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, kept in state["state"].items():
        values[str(parameter)] = {
            name: value for name, value in kept.items() if not isinstance(value, Tensor)
        }
        tensors |= {f"{parameter}.{name}": value for name, value in kept.items() if isinstance(value, Tensor)}
    return {**{name: value for name, value in state.items() if name != "state"}, "state": values}, tensors


def joined_optimiser(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state dict that `split_optimiser` took apart."""
    state = {int(parameter): dict(kept) for parameter, kept in values["state"].items()}
    for name, tensor in tensors.items():
        parameter, _, key = name.partition(".")
        state[int(parameter)][key] = tensor
    return {**values, "state": state}
