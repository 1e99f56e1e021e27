"""Pretrained weights of a body: torchvision's weights API, or a checkpoint file such as in-place ABN's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.build import torchvision_weights


def load_pretrained(network: nn.Module, name: str, source: str) -> str:
    """Fill the body with pretrained weights and say where they came from.

    Args:
        network: built as `name`; one without a `body` is filled as a whole.
        name: of NETWORKS.
        source: "imagenet" for torchvision's weights, or the path of a checkpoint: a state dict, or
            {"state_dict": …} or {"model": …}, with or without the prefix "module."; the classifier of the
            pre-training task is left out. A body with a method `adapt` brings the keys into its own form.

    Raises:
        UserError: no such file, a file that is cut off, or weights that do not fit the body.
    """
    state, described = _from_torchvision(name) if source == "imagenet" else (_from_file(source), source)
    body: Any = getattr(network, "body", network)
    state = {key.removeprefix("module.").removeprefix("body."): value for key, value in state.items()}
    if hasattr(body, "adapt"):
        state = body.adapt(state)
    wanted = body.state_dict()
    fitting = {
        key: value for key, value in state.items() if key in wanted and wanted[key].shape == value.shape
    }
    missing = [key for key in wanted if key not in fitting and not key.endswith("num_batches_tracked")]
    if missing:
        lacking = f"{len(missing)} of {len(wanted)} tensors are missing, first {missing[0]!r}"
        raise UserError(f"pretrained = {source!r}: does not fit network {name!r}: {lacking}")
    body.load_state_dict(fitting, strict=False)
    return described


def _from_torchvision(name: str) -> tuple[dict[str, Tensor], str]:
    """(state dict, what it is) of the ImageNet weights of a network's body."""
    known = torchvision_weights(name)
    if not known:
        cure = 'give the path of a checkpoint, or ""'
        raise UserError(f"pretrained = 'imagenet': network {name!r} has no torchvision weights; {cure}")
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(known).IMAGENET1K_V1  # what the authors used
        state = weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # whatever the download raises, the cure is the same
        what = f'cannot fetch torchvision\'s {known} weights ({error}); give a path, or ""'
        raise UserError(f"pretrained = 'imagenet': {what}") from None
    return dict(state), f"torchvision {weights}"


def _from_file(source: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint file."""
    if not Path(source).is_file():
        raise UserError(f"pretrained = {source!r}: no such file")
    content: Any
    try:
        if source.endswith(".safetensors"):
            content = load_file(source)
        else:
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise anything
        what = f"cut off, or not a checkpoint of tensors ({type(error).__name__})"
        raise UserError(f"pretrained = {source!r}: cannot be read: {what}") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and key in content:
            content = content[key]
            break
    state = content if isinstance(content, dict) else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
