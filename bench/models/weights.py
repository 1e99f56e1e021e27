"""Pretrained weights of a body: torchvision's weights API, or a checkpoint file such as in-place ABN's."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.errors import UserError
from bench.models.build import NETWORKS
from bench.models.network import Network


def load_pretrained(network: Network, name: str, source: str) -> str:
    """Fill the body with pretrained weights and say where they came from.

    Args:
        network: built as `name`.
        name: of NETWORKS.
        source: "imagenet" for torchvision's weights, or the path of a checkpoint: a state dict, or {"state_dict": …} or
            {"model": …}, with or without the prefix "module."; the classifier of the pre-training task is left out. A body with a method
            `adapt` brings the keys into its own form.

    Raises:
        UserError: no such file, a file that is cut off, or weights that do not fit the body.
    """
    kind = NETWORKS[name]
    if source == "imagenet":
        if not kind.weights:
            raise UserError(f"pretrained = 'imagenet': network {name!r} has no torchvision weights; give the path of a checkpoint, or \"\"")
        import torchvision

        try:
            weights = torchvision.models.get_model_weights(kind.weights).IMAGENET1K_V1  # what the authors used
            state = weights.get_state_dict(progress=True, check_hash=True)
        except Exception as error:  # whatever the download raises, the cure is the same
            raise UserError(f"pretrained = 'imagenet': cannot fetch torchvision's {kind.weights} weights ({error}); give a path, or \"\"") from None
        described = f"torchvision {weights}"
    else:
        if not Path(source).is_file():
            raise UserError(f"pretrained = {source!r}: no such file")
        try:
            content = load_file(source) if source.endswith(".safetensors") else torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or foreign file can raise anything
            raise UserError(f"pretrained = {source!r}: cannot be read: cut off, or not a checkpoint of tensors ({type(error).__name__})") from None
        state = content.get("state_dict", content.get("model", content)) if isinstance(content, dict) else {}
        described = source
    state = {key.removeprefix("module.").removeprefix("body."): value for key, value in state.items() if isinstance(value, Tensor)}
    if hasattr(network.body, "adapt"):
        state = network.body.adapt(state)  # type: ignore[operator]
    elif kind.activated and "conv1.weight" in state:
        state = torchvision_to_abn(state)
    elif not kind.activated and kind.weights:
        state = {re.sub(r"^(conv1|bn1)\.", r"stem.\1.", key): value for key, value in state.items()}
    wanted = network.body.state_dict()
    fitting = {key: value for key, value in state.items() if key in wanted and wanted[key].shape == value.shape}
    missing = [key for key in wanted if key not in fitting and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"pretrained = {source!r}: does not fit network {name!r}: {len(missing)} of {len(wanted)} tensors are missing, first {missing[0]!r}"
        )
    network.body.load_state_dict(fitting, strict=False)
    return described


def torchvision_to_abn(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's ResNet keys as those of the MiB family's body.

    The norms' scale |gamma| + eps stands where torchvision's is gamma: every negative gamma changes sign here, and the epsilon (1e-5)
    is far below the precision of the weights.
    """
    out = {}
    for key, value in state.items():
        match = re.match(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.(\d))\.(.*)", key)
        if match:
            stage, block, kind, number, down, rest = match.groups()
            prefix = f"mod{int(stage) + 1}.block{int(block) + 1}."
            out[prefix + (f"convs.{kind}{number}." if kind else ("proj_conv." if down == "0" else "proj_bn.")) + rest] = value
        elif key.startswith(("conv1.", "bn1.")):
            out["mod1." + key] = value
    return out
