"""From protocols, methods and seeds to a plan. Whatever would make a job fail before it starts is refused
here."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from bench.data.dataset import Dataset
from bench.data.index import ClassIndex, class_indexes, map_fingerprint
from bench.errors import UserError
from bench.method.recipe import TRACKS
from bench.method.registry import METHODS, MethodSpec, method
from bench.method.resolve import Resolved, overrides_for, parse_overrides, resolve
from bench.method.settings import TRAINING
from bench.models.build import NETWORKS, torchvision_weights
from bench.plan.keys import chained, content_digest, digest
from bench.plan.plan import SMOKE_ITERATIONS, Chain, Job, Part, Plan
from bench.protocol.file import PROTOCOLS, load
from bench.protocol.labels import rule
from bench.protocol.protocol import Protocol
from bench.store.records import KEY_FORMAT
from bench.store.results import RESERVED

_Data = tuple[Mapping[str, ClassIndex], Callable[[str], str]]
"""Class index of a data set, and digest of its named maps of a kind."""


@functools.cache
def _file_digest(path: str) -> str:
    """Content of a weights file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"pretrained = {path!r}: {error.strerror}") from None


class _Expansion:
    """A protocol with its class index: image counts and digests per step, computed once.

    `map_digest` gives the digest of the named maps of a kind.
    """

    def __init__(
        self, protocol: Protocol, index: Mapping[str, ClassIndex], map_digest: Callable[[str], str]
    ) -> None:
        self.protocol, self.index, self.map_digest = protocol, index, map_digest
        self._steps: dict[tuple[int, str], tuple[int, str]] = {}

    def images(self, t: int, label_rule: str) -> tuple[int, str]:
        """(number, digest) of the training images of step t, and of what it is validated on where rules
        differ in it."""
        label_rule = (
            label_rule if self.protocol.setting == "disjoint" else ""
        )  # elsewhere every rule takes the same
        if (t, label_rule) not in self._steps:
            presence = self.index["train"].presence
            if label_rule:
                labels = rule(label_rule)
                positions = labels.images("train", self.protocol, t, presence)
                validated = labels.images("validation", self.protocol, t, self.index["test"].presence)
                text = f"{positions}{validated if labels.own_setting else ''}"
            else:
                positions = self.protocol.train_images(t, presence)
                text = str(positions)
            self._steps[t, label_rule] = len(positions), digest(text)
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
        protocols: names, with wildcards (`voc-15-*`), files, or protocols.
        methods: names as `bench.method.registry.method` takes them, with wildcards (`nest+*`).
        track: a name of `bench list tracks`; None: the data set's own.
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
    specs = [method(name) for name in METHODS.match(methods, where="--methods")]
    if not specs:
        raise UserError("--methods: empty; name at least one (bench list methods)")
    if not seeds:
        raise UserError("--seeds: empty; name at least one, for example --seeds 0,1,2")
    parsed = parse_overrides(overrides)
    jobs: dict[str, Job] = {}
    chains: list[Chain] = []
    warnings: list[str] = []
    loaded: dict[Dataset, _Data] = {}
    joint: dict[tuple[object, ...], _Expansion] = {}
    for protocol in _loaded(protocols, setting):
        dataset = protocol.dataset
        if not track:
            TRACKS.find(dataset.track, f"data set {dataset.name!r}: track")
        if dataset not in loaded:  # and not by name: two files of one name may be asked for
            loaded[dataset] = _data(dataset, data_root, (indexes or {}).get(dataset.name))
        expansion = _Expansion(protocol, *loaded[dataset])
        together = (dataset, protocol.order, protocol.setting)
        at_once = joint.setdefault(together, _Expansion(protocol.at_once(), *loaded[dataset]))
        for spec in specs:
            used = track or dataset.track
            recipe = resolve(spec, protocol, used, overrides_for(spec, parsed, specs))
            recipe, warning = with_weights(recipe)
            if warning:
                warnings.append(warning)
            spec.cls.check(recipe.config, protocol)
            maker = _ChainMaker(spec, recipe, at_once if spec.cls.at_once else expansion, smoke)
            footnotes = tuple(
                dict.fromkeys([*footnotes_of(spec, recipe, protocol), *([warning] if warning else [])])
            )
            for seed in seeds:
                keys = maker.jobs(seed, jobs)
                chains.append(Chain(protocol, used, recipe.label, spec.title, seed, keys, footnotes, recipe))
    return Plan(jobs, chains, str(data_root) if data_root else None, smoke, tuple(dict.fromkeys(warnings)))


def _data(dataset: Dataset, data_root: str | Path | None, index: Mapping[str, ClassIndex] | None) -> _Data:
    """The class index of a data set (`index` if it is given, for plans to look at), and digests of its
    maps."""
    if index is not None:
        return index, lambda kind: "not known"
    maps = functools.cache(functools.partial(map_fingerprint, dataset, data_root))
    return class_indexes(dataset, data_root), maps


def _loaded(protocols: Sequence[str | Protocol], setting: str | None) -> list[Protocol]:
    """Protocols by name, with wildcards expanded."""
    found = []
    for given in protocols:
        if isinstance(given, Protocol):
            found.append(given)
            continue
        names = [given] if given.endswith(".toml") else PROTOCOLS.match([given], where="--protocol")
        found += [load(name, setting) for name in names]
    for protocol in found:
        if protocol.label in RESERVED or protocol.name.startswith("."):
            what = f"a protocol cannot be called {protocol.name!r}"
            raise UserError(f"{protocol.name}.toml: {what}: results keep other things under that name")
    return found


def with_weights(recipe: Resolved) -> tuple[Resolved, str]:
    """A recipe whose pretrained weights are there, and a warning if they are not and training starts from
    scratch.

    A weights file is looked for as it is written, then in ./pretrained. Weights that --set names must be
    there.
    """
    network, name = recipe.config.at(0).network, recipe.config.pretrained
    in_torchvision = torchvision_weights(network)
    if name == "imagenet" and not in_torchvision:
        able = ", ".join(other for other, kind in NETWORKS.everything()[0].items() if kind.weights)
        raise UserError(
            f"network = {network!r} has no torchvision weights: pretrained = 'imagenet' is for {able}"
        )
    if name in ("", "imagenet"):
        return recipe, ""
    for path in (Path(name), Path("pretrained") / name):
        if os.path.isfile(path):  # unlike the method, False also for a name too long
            found = recipe.config.model_copy(update={"pretrained": str(path.resolve())})
            return replace(recipe, config=found), ""
    if recipe.sources["pretrained"] == "--set":
        raise UserError(f"--set pretrained={name}: no such file here or in ./pretrained")
    instead = " (torchvision's: --set pretrained=imagenet)" if in_torchvision else ""
    warning = (
        f"trained from scratch: the recipe's weights {name} are neither here nor in ./pretrained{instead}"
    )
    return replace(recipe, config=recipe.config.model_copy(update={"pretrained": ""})), warning


def footnotes_of(spec: MethodSpec, recipe: Resolved, protocol: Protocol) -> list[str]:
    """What a fair comparison must not hide: the method's caveats, and those that follow from its settings."""
    notes = [*spec.cls.footnotes(recipe.config)]
    note = rule(recipe.config.label_rule).note
    if note and protocol.dataset.background == "class":  # elsewhere there is no void
        notes.append(note)
    if recipe.config.augmentation in ("scale-crop", "resize-scale-crop"):
        notes.append("padding around images is trained as background")
    selecting = [recipe.config.at(step).selection != "last" for step in (0, 1)]
    if any(selecting):
        which = {
            (True, True): "each step",
            (True, False): "step 0",
            (False, True): "each step after the first",
        }
        who = which[selecting[0], selecting[1]]
        notes.append(f"{who} hands on the iterate that scores best on the test images of its classes")
    return [*notes, *recipe.notes]


class _ChainMaker:
    """Makes the jobs of one method on one protocol, for any seed."""

    def __init__(self, spec: MethodSpec, recipe: Resolved, expansion: _Expansion, smoke: bool) -> None:
        self.spec, self.recipe, self.expansion, self.smoke = spec, recipe, expansion, smoke
        self.parts = [self._part(t) for t in range(len(expansion.protocol.groups))]

    def _part(self, t: int) -> Part:
        """The job of step t."""
        protocol = self.expansion.protocol
        config = self.recipe.config
        owner = method(self.spec.first_step) if t == 0 else self.spec
        records = self.spec.cls.records(config) if t == 0 and owner.plain != self.spec.plain else {}
        if owner.config is not self.spec.config:  # what both know has this method's value
            shared = {
                name: getattr(config, name)
                for name in config.model_fields
                if name in owner.config.model_fields
            }
            config = owner.config(**shared)
        folded = config.at(t)
        n, images = self.expansion.images(t, folded.label_rule)
        batch = folded.batch_size
        lengths = owner.cls.lengths(folded, t, n).values()
        fewest = min(n, *(length.images for length in lengths))  # a phase may take a part of them
        if fewest < batch and not self.smoke:
            what = f"{fewest} training images are fewer than batch_size = {batch}, so an epoch would be empty"
            cure = f"use for example --set batch_size={max(1, fewest // 2)}"
            raise UserError(f"{protocol.label}, step {t}: {what}; {cure}")
        keyed = config.keyed(t)
        if keyed.get("pretrained") not in (None, "", "imagenet"):
            keyed["pretrained"] = _file_digest(str(keyed["pretrained"]))
        groups = [list(group) for group in protocol.groups]
        content: dict[str, object] = {
            "format": KEY_FORMAT,
            "kind": "train",
            "data": self._data(owner, config),
            "classes": groups[: t + 1],
            "images": images,
            "method": {
                "name": owner.plain,
                "version": owner.version,
                "settings": {name: value for name, value in keyed.items() if name not in TRAINING},
            },
            "training": {name: value for name, value in keyed.items() if name in TRAINING},
            "smoke": self.smoke,
        }
        if owner.cls.knows_later:
            content["later"] = groups[t + 1 :]
        plain = content_digest(content)
        content["records"] = records
        recorders = {kind.name: f"{kind.__module__}:{kind.__qualname__}" for kind in self.spec.cls.recorders}
        iterations = SMOKE_ITERATIONS if self.smoke else sum(length.count(batch) for length in lengths)
        return Part(
            content,
            content_digest(content),
            plain,
            protocol,
            t,
            owner.name,
            config,
            n,
            iterations,
            recorders if records else {},
        )

    def _data(self, owner: MethodSpec, config: object) -> dict[str, JsonValue]:
        """Digests of the data that a step sees."""
        dataset, index = self.expansion.protocol.dataset, self.expansion.index
        maps: dict[str, JsonValue] = {}
        for kind in owner.cls.maps(config):
            try:
                maps[kind] = self.expansion.map_digest(kind)
            except UserError as error:
                modes = f"its modes without: bench show method {owner.name}"
                raise UserError(f"{error}; {owner.name} needs them ({modes})") from None
        return {
            "set": dataset.name,
            "train": index["train"].fingerprint,
            "test": index["test"].fingerprint,
            "maps": maps,
        }

    def jobs(self, seed: int, jobs: dict[str, Job]) -> tuple[str, ...]:
        """Add this chain's jobs to `jobs` and return their keys."""
        keys: list[str] = []
        for part in self.parts:
            parent = keys[-1] if keys else None
            key = chained(part.digest, seed, parent)
            if key not in jobs:
                jobs[key] = Job(key, part, seed, parent)
            keys.append(key)
        return tuple(keys)
