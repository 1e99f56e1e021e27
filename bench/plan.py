"""The plan: which jobs a run consists of, which of them are shared, and how much work each is.

A job is one step of one chain (protocol, method, seed). Its key is a hash of everything that decides its outcome, its parent's key
among it. Jobs with the same key are one job: they are trained once and shared.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.data.index import ClassIndex, class_indexes, saliency_fingerprint
from bench.data.labels import rule
from bench.errors import UserError
from bench.models.build import check_network, network_names, torchvision_weights
from bench.protocol import Protocol, load
from bench.recipe import TRAINING, Recipe, overrides_for, parse_overrides, resolve
from bench.registry import MethodSpec, method

FORMAT = 1
"""Raised when the engine changes what a job with the same inputs yields."""
SMOKE_ITERATIONS = 2


@dataclass(frozen=True)
class Job:
    """One step to be trained.

    Attributes:
        key: of its inputs.
        inputs: everything that decides the outcome.
        protocol: the protocol (its joint form where the method learns all at once).
        step: index of the step.
        method: the method that trains it; for a shared step 0 the one that owns it.
        settings: all values of that method's Config, as its process will read them.
        images, iterations: size of the work.
    """

    key: str
    inputs: Mapping[str, Any]
    protocol: Protocol
    step: int
    method: str
    settings: Mapping[str, Any]
    images: int
    iterations: int

    @property
    def parent(self) -> str | None:
        return self.inputs["parent"]


@dataclass(frozen=True)
class Chain:
    """One method on one protocol with one seed: the keys of its steps, and how results name it."""

    protocol: Protocol
    track: str
    method: str
    title: str
    seed: int
    keys: tuple[str, ...]
    footnotes: tuple[str, ...]
    recipe: Recipe = field(repr=False, compare=False)

    def place(self, index: int, folder: str | None = None) -> str:
        """Where results link to the job of a step."""
        return f"{folder or self.protocol.label}/{self.track}/{self.method}/seed-{self.seed}/step-{index}"


@dataclass(frozen=True)
class Plan:
    """Jobs in an order in which each comes after its parent, and the chains that use them."""

    jobs: Mapping[str, Job]
    chains: Sequence[Chain]
    data_root: str | None
    smoke: bool
    warnings: Sequence[str] = ()

    def users(self, key: str) -> list[Chain]:
        """The chains that contain a job."""
        return self._users.get(key, [])

    @functools.cached_property
    def _users(self) -> dict[str, list[Chain]]:
        found: dict[str, list[Chain]] = {}
        for chain in self.chains:
            for key in chain.keys:
                found.setdefault(key, []).append(chain)
        return found

    def descendants(self, keys: set[str]) -> set[str]:
        """All jobs that need one of `keys`, directly or not."""
        below: set[str] = set()
        for key, job in self.jobs.items():
            if job.parent in keys or job.parent in below:
                below.add(key)
        return below


def content_key(inputs: Mapping[str, Any]) -> str:
    """16 hex digits that stand for these inputs."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _file_digest(path: str) -> str:
    """Content of a weights file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"pretrained = {path!r}: {error.strerror}") from None


class _Expansion:
    """A protocol with its class index: image counts and digests per step, computed once; `saliency` gives the digest of the saliency maps."""

    def __init__(self, protocol: Protocol, index: Mapping[str, ClassIndex], saliency: Callable[[], str]) -> None:
        self.protocol, self.index, self.saliency = protocol, index, saliency
        self._steps: dict[tuple[int, str], tuple[int, str]] = {}

    def images(self, t: int, label_rule: str) -> tuple[int, str]:
        """(number, digest) of the training images of step t."""
        label_rule = label_rule if self.protocol.setting == "disjoint" else ""  # elsewhere every rule takes the same images
        if (t, label_rule) not in self._steps:
            presence = self.index["train"].presence
            positions = rule(label_rule).images("train", self.protocol, t, presence) if label_rule else self.protocol.train_images(t, presence)
            self._steps[t, label_rule] = (len(positions), hashlib.sha256(str(positions).encode()).hexdigest()[:16])
        return self._steps[t, label_rule]


def make_plan(
    protocols: Sequence[str | Protocol],
    methods: Sequence[str],
    track: str | None = None,
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
    setting: str | None = None,
    data_root: str | Path | None = None,
    smoke: bool = False,
    indexes: Mapping[str, Mapping[str, ClassIndex]] | None = None,
) -> Plan:
    """Expand protocols x methods x seeds into jobs.

    Args:
        protocols: names, files, or protocols.
        methods: names as `bench.registry.method` takes them.
        track: "published", "controlled" or "small"; None: the data set's own.
        seeds: one chain each.
        overrides: items of --set.
        setting: instead of the protocol file's.
        data_root: where the data set is.
        smoke: two iterations a step.
        indexes: class indexes by data set and split, instead of those of the data.

    Raises:
        UserError: for anything that would make a job fail before it starts.
    """
    if not protocols:
        raise UserError("--protocol: empty; name at least one (bench list protocols)")
    specs = [method(name) for name in dict.fromkeys(methods)]
    if not specs:
        raise UserError("--methods: empty; name at least one (bench list methods)")
    if not seeds:
        raise UserError("--seeds: empty; name at least one, for example --seeds 0,1,2")
    parsed = parse_overrides(overrides)
    jobs: dict[str, Job] = {}
    chains: list[Chain] = []
    warnings: list[str] = []
    loaded: dict[str, Mapping[str, ClassIndex]] = dict(indexes or {})
    saliency: dict[str, Callable[[], str]] = {name: lambda: "not known" for name in loaded}  # indexes without data: plans to look at
    joint: dict[tuple[Any, ...], _Expansion] = {}
    for given in protocols:
        protocol = given if isinstance(given, Protocol) else load(given, setting)
        name = protocol.dataset.name
        if name not in loaded:
            loaded[name] = class_indexes(protocol.dataset, data_root)
        if name not in saliency:
            saliency[name] = functools.cache(functools.partial(saliency_fingerprint, protocol.dataset, data_root))
        expansion = _Expansion(protocol, loaded[name], saliency[name])
        at_once = joint.setdefault((name, protocol.order, protocol.setting), _Expansion(protocol.at_once(), loaded[name], saliency[name]))
        for spec in specs:
            used = track or protocol.dataset.track
            recipe = resolve(spec, protocol, used, overrides_for(spec, parsed, specs))
            check_network(recipe.config.network, spec.classifier)
            recipe, warning = with_weights(recipe)
            if warning:
                warnings.append(warning)
            spec.check(recipe.config, protocol)
            maker = _ChainMaker(spec, recipe, at_once if spec.cls.at_once else expansion, smoke)
            for seed in seeds:
                keys = maker.jobs(seed, jobs)
                footnotes = tuple(dict.fromkeys([*footnotes_of(spec, recipe), *([warning] if warning else [])]))
                chains.append(Chain(protocol, used, recipe.label, spec.title, seed, keys, footnotes, recipe))
    return Plan(jobs, chains, str(data_root) if data_root else None, smoke, tuple(dict.fromkeys(warnings)))


def with_weights(recipe: Recipe) -> tuple[Recipe, str]:
    """A recipe whose pretrained weights are there, and a warning if they are not and training starts from scratch.

    A weights file is looked for as it is written, then in ./pretrained. Weights that --set names must be there.
    """
    name = recipe.config.pretrained
    in_torchvision = torchvision_weights(recipe.config.network)
    if name == "imagenet" and not in_torchvision:
        able = ", ".join(other for other in network_names() if torchvision_weights(other))
        raise UserError(f"network = {recipe.config.network!r} has no torchvision weights: pretrained = 'imagenet' is for {able}")
    if name in ("", "imagenet"):
        return recipe, ""
    for path in (Path(name), Path("pretrained") / name):
        if os.path.isfile(path):  # unlike the method, False also for a name too long
            return replace(recipe, config=recipe.config.model_copy(update={"pretrained": str(path.resolve())})), ""
    if recipe.sources["pretrained"] == "--set":
        raise UserError(f"--set pretrained={name}: no such file here or in ./pretrained")
    instead = " (torchvision's: --set pretrained=imagenet)" if in_torchvision else ""
    warning = f"trained from scratch: the recipe's weights {name} are neither here nor in ./pretrained{instead}"
    return replace(recipe, config=recipe.config.model_copy(update={"pretrained": ""})), warning


def footnotes_of(spec: MethodSpec, recipe: Recipe) -> list[str]:
    """What a fair comparison must not hide: the method's caveats, and those that follow from its settings."""
    notes = [*spec.footnotes(recipe.config)]
    note = rule(recipe.config.label_rule).note
    if note:
        notes.append(note)
    if recipe.config.augmentation in ("scale-crop", "resize-scale-crop"):
        notes.append("padding around images is trained as background")
    if recipe.config.selection != "last":
        notes.append("each step hands on the iterate that scores best on the test images of its classes")
    return notes


class _ChainMaker:
    """Makes the jobs of one method on one protocol, for any seed."""

    def __init__(self, spec: MethodSpec, recipe: Recipe, expansion: _Expansion, smoke: bool) -> None:
        self.spec, self.recipe, self.expansion, self.smoke = spec, recipe, expansion, smoke
        self.parts = [self._part(t) for t in range(len(expansion.protocol.groups))]

    def _part(self, t: int) -> tuple[dict[str, Any], str, dict[str, Any], int, int]:
        """(inputs without seed and parent, method that trains, its settings, images, iterations) of step t."""
        protocol, index = self.expansion.protocol, self.expansion.index
        config = self.recipe.config
        owner = method(self.spec.first_step) if t == 0 else self.spec
        values = config.at(t)
        training = {name: value for name, value in values.items() if name in TRAINING}
        if training.get("pretrained") not in (None, "", "imagenet"):
            training["pretrained"] = _file_digest(training["pretrained"])
        if owner.config is not self.spec.config:  # a step 0 that belongs to another method: what both know has this method's value
            shared = {name: getattr(config, name) for name in config.model_fields if name in owner.config.model_fields}
            config = owner.config(**shared)
        own = {name: value for name, value in config.at(t).items() if name not in TRAINING}
        data = {"set": protocol.dataset.name, "train": index["train"].fingerprint, "test": index["test"].fingerprint}
        if owner.build(config).needs_saliency():
            try:
                data["saliency"] = self.expansion.saliency()
            except UserError as error:
                raise UserError(f"{error}; {owner.name} needs them (its modes without: bench show method {owner.name})") from None
        n, digest = self.expansion.images(t, values["label_rule"])
        batch = values["batch_size"]
        if n < batch and not self.smoke:
            raise UserError(
                f"{protocol.label}, step {t}: {n} training images are fewer than batch_size = {batch}, so an epoch would be empty; "
                f"use for example --set batch_size={max(1, n // 2)}"
            )
        inputs = {
            "format": FORMAT,
            "data": data,
            "classes": [list(group) for group in protocol.groups[: t + 1]],
            "images": digest,
            "method": {"name": _plain(owner.name), "version": owner.version, **own},
            "training": training,
            "smoke": self.smoke,
        }
        iterations = SMOKE_ITERATIONS if self.smoke else owner.cls.iterations(config, t, n)
        return inputs, owner.name, config.model_dump(), n, iterations

    def jobs(self, seed: int, jobs: dict[str, Job]) -> tuple[str, ...]:
        """Add this chain's jobs to `jobs` and return their keys."""
        keys: list[str] = []
        for t, (inputs, owner, settings, images, iterations) in enumerate(self.parts):
            complete = {**inputs, "seed": seed, "parent": keys[-1] if keys else None}
            key = content_key(complete)
            if key not in jobs:
                jobs[key] = Job(key, complete, self.expansion.protocol, t, owner, settings, images, iterations)
            keys.append(key)
        return tuple(keys)


def _plain(name: str) -> str:
    """A method's name without the variants of its recipe, which only set values."""
    return "+".join(part.partition("@")[0] for part in name.split("+"))
