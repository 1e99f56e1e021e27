"""The network of a job: built, filled with what the previous step left, grown; its teacher; the method's own
modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import distributed
from bench.errors import UserError
from bench.method.interface import Method
from bench.method.step_data import StepData
from bench.models.build import NETWORKS
from bench.models.weights import load_pretrained
from bench.plan.keys import key_of
from bench.seeds import mix
from bench.store.records import JobRecord, read_record
from bench.store.results import Store
from bench.train.tensors import read_tensors, scoped, unscoped
from bench.train.trainer import Trainer

MODULES = "modules"
"""Under this word, and a dot, a state holds the tensors of a method's own modules."""


def _sizes(data: StepData) -> list[int]:
    """Channels that each step so far adds, background in the first."""
    return [data.protocol.step(t).n_new for t in range(data.step.index + 1)]


def assemble(built: Method, trainer: Trainer, record: JobRecord, store: Store) -> str:
    """Give a method its network with this step's heads, its teacher, and what the previous step left.

    Returns:
        Where the body's weights came from, in words; "" after step 0.
    """
    sizes, pretrained = _sizes(built.data), ""
    if not built.step.index:
        built.network = built.build_network(sizes)
        pretrained = _load_pretrained(built)
    else:
        built.network = built.build_network(sizes[:-1]).to(trainer.dtype)  # so that no bit is lost
        folder = store.artifact(_parent(record, store).key)
        _fill_from(folder, built.network)
        built.previous = _left(folder, trainer.device)
        if built.needs_teacher:
            built.teacher = built.make_teacher(built.network)
        built.grow_network(built.network, sizes)
    _to_device(built, trainer)
    return pretrained


def assemble_finished(built: Method, trainer: Trainer, folder: Path) -> None:
    """Give a method the network and the state that a finished job left in its artifact `folder`."""
    sizes = _sizes(built.data)
    built.network = built.build_network(sizes[:-1] or sizes).to(trainer.dtype)
    if len(sizes) > 1:
        built.grow_network(built.network, sizes)
    _fill_from(folder, built.network)
    left = _left(folder, trainer.device)
    built.state.update({name: value for name, value in left.items() if not name.startswith(f"{MODULES}.")})
    _to_device(built, trainer)
    for name, module in built.modules.items():
        prefix = f"{MODULES}.{name}"
        fill(module, unscoped(prefix, {n: v for n, v in left.items() if isinstance(v, Tensor)}), folder)


def _to_device(built: Method, trainer: Trainer) -> None:
    """Network, teacher and the method's own modules on the device, in the precision asked for, norms
    synchronised."""
    several = distributed.world_size() > 1 and trainer.device.type == "cuda"
    torch.manual_seed(mix(trainer.seed, MODULES, built.step.index))
    modules: dict[str, nn.Module] = built.own_modules()
    if several:  # plain batch norms; activated ones synchronise themselves
        built.network = nn.SyncBatchNorm.convert_sync_batchnorm(built.network)
        modules = {name: nn.SyncBatchNorm.convert_sync_batchnorm(module) for name, module in modules.items()}
    for module in (built.network, built.teacher, *modules.values()):
        if module is not None:
            module.to(trainer.device, trainer.dtype, memory_format=torch.channels_last)
    built.modules = modules


def _load_pretrained(built: Method) -> str:
    """Pretrained weights for the body at step 0, or a loud word that there are none."""
    config = built.config
    if config.pretrained:
        return load_pretrained(built.network, config.network, config.pretrained)
    if NETWORKS.find(config.network).weights:
        print(f'WARNING: {config.network} is trained from scratch: pretrained = ""', flush=True)
    return "none: trained from scratch"


def _parent(record: JobRecord, store: Store) -> JobRecord:
    """The record of the previous step's job."""
    found = finished(record, store)
    if found.inputs.classes != record.inputs.classes[:-1]:
        raise _another(store.artifact(found.key))
    return found


def finished(record: JobRecord, store: Store) -> JobRecord:
    """The record of the finished job that another needs."""
    folder = store.artifact(str(record.inputs.parent))
    found = read_record(folder / JobRecord.file, JobRecord)
    if found is None:
        raise UserError(f"{folder}: the previous step is not there; run bench run again")
    if key_of(found.inputs) != record.inputs.parent:
        raise _another(folder)
    return found


def _another(folder: Path) -> UserError:
    what = "holds a step of another method, protocol or class order than its name says"
    return UserError(f"{folder}: {what}; run again with --force")


def _fill_from(folder: Path, network: nn.Module) -> None:
    """The weights of an artifact into a network that must fit them exactly."""
    path = folder / "model.safetensors"
    fill(network, read_tensors(path)[0], path)


def _left(folder: Path, device: torch.device) -> dict[str, Any]:
    """The state that a job left: tensors on the device, and values."""
    tensors, values = read_tensors(folder / "state.safetensors")
    return {**{name: t.to(device) for name, t in tensors.items()}, **(values or {})}


def fill(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a module that must fit them exactly."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        what = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        question = "another method, class count or network?"
        raise UserError(f"{path}: does not fit this network ({question}): {what}") from None


def modules_state(method: Method) -> dict[str, Tensor]:
    """Tensors of the method's own modules, as a state holds them."""
    return {
        name: tensor
        for own, module in method.modules.items()
        for name, tensor in scoped(f"{MODULES}.{own}", module.state_dict()).items()
    }
