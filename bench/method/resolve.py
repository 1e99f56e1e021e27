"""From a method's recipe to the values of a run: every hyper-parameter typed and checked, and where its value
comes from.

A value is looked up in this order, the last one found wins:

    the method's Config  <  [method]  <  the track  <  the variant  <  --set

The track "published" is each method's own recipe; the others stand in tracks.toml, the same for every method.
In each of them, what is said of a protocol wins over what is said of its data set, and that over what is said
of everything (bench.method.recipe).
"""

from __future__ import annotations

import fnmatch
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from bench import shipped
from bench.data.augment import AUGMENTATIONS
from bench.errors import UserError, unknown
from bench.files import explained
from bench.method.recipe import PUBLISHED, TRACKS, Layer, Recipe, Scoped, read_recipe
from bench.method.registry import MethodSpec
from bench.method.settings import Settings
from bench.models.build import check_network
from bench.protocol.labels import RULES
from bench.protocol.protocol import Protocol

LABEL_LENGTH = 120
"""Settings in a label, which is a folder's name, are cut here."""


@dataclass(frozen=True)
class Resolved:
    """All values of a method on one protocol and track.

    Attributes:
        config: the checked values.
        sources: where each value came from, in words.
        label: the method's name as results carry it; values given by --set are part of it, but for those that
            decide nothing of the outcome.
        notes: what the recipes say of these values: who ran them, and where nobody did.
    """

    config: Settings
    sources: Mapping[str, str]
    label: str
    notes: tuple[str, ...] = ()


def _tables(spec: MethodSpec, kind: str) -> list[Scoped]:
    """What recipes say in tables of a kind ("method" or a track): the wrapped method's first, then its
    wrapper's, then what the wrapper has around that method alone, in [on.<method>.<kind>]."""
    recipe = spec.recipes[-1]
    own = _with_model(recipe, recipe.table(kind), kind)
    if spec.base is None:
        return own
    around = recipe.around.get(spec.base.plain, {}).get(kind)
    return [*_tables(spec.base, kind), *own, *([around] if around else [])]


def _with_model(recipe: Recipe, scoped: Scoped, track: str) -> list[Scoped]:
    """A table of a recipe, after the training settings of the recipe that it says it is like."""
    if not scoped.like:
        return [scoped]
    name = f"{scoped.like.replace('-', '_')}.toml"
    places = (recipe.path.with_name(name), shipped.PACKAGE.parent / "methods" / name)
    beside = next((place for place in places if place.is_file()), None)
    if beside is None:
        where = f"{recipe.path}: {scoped.place.partition(' ')[2]} like = {scoped.like!r}"
        raise UserError(f"{where}: there is no {name} beside it or among the shipped methods")
    return [read_recipe(beside).table(track).training_only(), scoped]


def published_on(spec: MethodSpec) -> list[str]:
    """Data sets and protocols that a method's published recipe names."""
    return sorted({name for scoped in _tables(spec, PUBLISHED) for name in scoped.scopes})


def _chosen(spec: MethodSpec, track: str) -> list[Scoped]:
    """What the chosen variants change, for every track and for this one."""
    return [
        scoped
        for recipe, variant in spec.variants
        for kind in ("", track)
        if kind in recipe.variants[variant]
        for scoped in _with_model(recipe, recipe.variants[variant][kind], track)
    ]


def told(spec: MethodSpec, protocol: Protocol, track: str) -> list[str]:
    """What the recipes of a track say of a protocol: footnotes, and whether anybody ran these values
    there."""
    tables = [*_tables(spec, track), *_chosen(spec, track)]
    notes = [note for scoped in tables for note in scoped.about(scoped.notes, protocol)]
    ran = next((scoped for scoped in reversed(tables) if scoped.ran is not None), None)
    if ran is not None and not any(fnmatch.fnmatch(protocol.name, word) for word in ran.ran or ()):
        source = [layer.source for scoped in tables for layer in scoped.layers(protocol) if layer.values][-1]
        notes.append(
            f"extrapolated from {source}: its authors ran {', '.join(ran.ran or ()) or 'no task of it'}"
        )
    settings = [word for scoped in tables for word in scoped.about(scoped.settings, protocol)]
    if settings and settings[-1] != protocol.setting:
        notes.append(f"its authors trained in the setting {settings[-1]}, this row is {protocol.setting}")
    return notes


def layers(spec: MethodSpec, protocol: Protocol, track: str) -> list[Layer]:
    """Everything that recipes and track say, from what counts least to what counts most.

    Raises:
        UserError: unknown track, or no published recipe for this data set.
    """
    found = TRACKS.find(track, where="--track")
    stack = [layer for scoped in _tables(spec, "method") for layer in scoped.layers(protocol)]
    tables = _tables(spec, track)
    if track == PUBLISHED and not any(protocol.dataset.name in scoped.scopes for scoped in tables):
        what = f"no published recipe for data set {protocol.dataset.name!r}"
        raise UserError(f"{spec.name}: {what}; use --track small or --track controlled")
    stack += found.table.layers(protocol)
    later = (*tables, *_chosen(spec, track))
    return [*stack, *(layer for scoped in later for layer in scoped.layers(protocol))]


def resolve(
    spec: MethodSpec, protocol: Protocol, track: str, overrides: Sequence[tuple[str, Any]] = ()
) -> Resolved:
    """All hyper-parameters of a method on a protocol, checked, each with its source.

    Args:
        spec: the method, from the registry.
        protocol: decides data-set and protocol values.
        track: a name of TRACKS.
        overrides: (key, value) pairs of --set that concern this method.

    Raises:
        UserError: unknown track or key, a value of the wrong type or out of range, or no published recipe for
            this data set.
    """
    fields = spec.config.model_fields
    values: dict[str, Any] = {}
    sources = dict.fromkeys(fields, "default")
    for layer in (*layers(spec, protocol, track), Layer("--set", dict(overrides))):
        for key, value in layer.values.items():
            if key not in fields:
                raise unknown("setting", key, fields, where=f"{layer.source} of {spec.name}")
            values[key] = value
            sources[key] = layer.source
    try:
        config = spec.config(**values)
    except ValidationError as error:
        first = str(error.errors()[0]["loc"][0])
        raise explained(error, spec.config, f"{sources[first]}: {spec.name}") from None
    for step in (0, 1):
        folded = config.at(step)
        RULES.find(folded.label_rule, f"{sources['label_rule']}: {spec.name}.label_rule")
        AUGMENTATIONS.find(folded.augmentation, f"{sources['augmentation']}: {spec.name}.augmentation")
        check_network(folded.network, spec.classifier)
    deciding = [(key, value) for key, value in sorted(overrides) if not spec.config.is_free(key)]
    given = ",".join(f"{key}={value}" for key, value in deciding).replace("/", ":")  # it is a folder's name
    if len(given) > LABEL_LENGTH:
        given = f"{given[:LABEL_LENGTH]}~{hashlib.sha256(given.encode()).hexdigest()[:8]}"
    label = f"{spec.name}[{given}]" if given else spec.name
    return Resolved(config, sources, label, tuple(told(spec, protocol, track)))


def parse_overrides(items: Sequence[str]) -> list[tuple[str, str, Any]]:
    """`key=value` or `method.key=value` of --set as (method or "", key, value); values are read as TOML, else
    as text.

    Of a key that is given twice the last value counts.
    """
    parsed: dict[tuple[str, str], Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--set {item}: write key=value or method.key=value")
        method, _, key = name.strip().rpartition(".")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        parsed[method, key] = value
    return [(method, key, value) for (method, key), value in parsed.items()]


def overrides_for(
    spec: MethodSpec, parsed: Sequence[tuple[str, str, Any]], everybody: Sequence[MethodSpec]
) -> list[tuple[str, Any]]:
    """The pairs of --set that concern one method. A key without a method must be known to every method of the
    run."""
    mine = []
    for method, key, value in parsed:
        if method:
            if method not in [other.name for other in everybody]:
                raise unknown(
                    "method", method, [other.name for other in everybody], where=f"--set {method}.{key}"
                )
            if method == spec.name:
                mine.append((key, value))
            continue
        knowing = [other.name for other in everybody if key in other.config.model_fields]
        if not knowing:
            names = {name for other in everybody for name in other.config.model_fields}
            raise unknown("setting", key, names, where="--set")
        if len(knowing) < len(everybody):
            alone = f"a setting of {', '.join(knowing)} alone; write {knowing[0]}.{key}={value}"
            raise UserError(f"--set {key}={value}: {alone}")
        mine.append((key, value))
    return mine
