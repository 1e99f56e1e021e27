"""Methods by name: their classes, their recipes, and one method around another. It finds them; nothing is
listed anywhere."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import shipped
from bench.errors import UserError, unknown
from bench.method.interface import Method
from bench.method.recipe import Recipe, is_slip, read_recipe
from bench.method.settings import Settings
from bench.models.build import BODIES, CLASSIFIERS, NETWORKS
from bench.names import Entry, Registry

ENTRY_POINTS = "bench.methods"


@dataclass(frozen=True)
class Found:
    """A method's class as its file has it, and its recipe."""

    cls: type[Method]
    recipe: Recipe


class Methods(Registry[Found]):
    """Every method that stands alone, and every wrapper. `method(name)` puts them together."""

    def candidates(self, pattern: str) -> list[str]:
        """For `nest+*` all that nest can be put around."""
        head, plus, rest = pattern.rpartition("+")
        if not plus:
            return [name for name in self.known() if not self._wraps(name)]
        found = []
        for name in self.candidates(rest):
            try:
                found.append(method(f"{head}+{name}").name)
            except UserError:
                continue
        return found

    def _wraps(self, name: str) -> bool:
        """Whether a method wraps others. One that cannot be loaded is an error for who asks for it alone."""
        try:
            return bool(self.find(name).cls.wraps)
        except UserError:
            return False


METHODS = Methods("method", ENTRY_POINTS)


@dataclass(frozen=True)
class MethodSpec:
    """A method as it was asked for: "mib", a variant of its recipe "mib@preset", or one around another,
    "nest+mib".

    Attributes:
        name: as written.
        cls: the class; for a composition the wrapper's before the wrapped one's, so that `super()` is the
            wrapped method.
        own: the class as its file has it; for a composition the wrapper's.
        recipes: the recipe files, the wrapped method's first.
        variants: (recipe, name) of the chosen variants.
        base: the wrapped method, or None.
    """

    name: str
    cls: type[Method]
    own: type[Method] = field(repr=False)
    recipes: tuple[Recipe, ...] = field(repr=False)
    variants: tuple[tuple[Recipe, str], ...] = field(default=(), repr=False)
    base: MethodSpec | None = None

    @property
    def config(self) -> type[Settings]:
        """The class of the hyper-parameters."""
        return self.cls.Config

    def build(self, config: Settings) -> Method:
        """An instance with these hyper-parameters."""
        return self.cls(config)

    @property
    def plain(self) -> str:
        """The name without the variants of the recipe, which only set values."""
        return "+".join(part.partition("@")[0] for part in self.name.split("+"))

    @property
    def first_step(self) -> str:
        """Name of the method whose step 0 this one builds on; its own (that of the innermost) if it has
        one."""
        return self.cls.first_step or self.plain.rpartition("+")[2]

    @property
    def classifier(self) -> str:
        return self.cls.classifier

    @property
    def title(self) -> str:
        own = self.variants[len(self.base.variants) :] if self.base else self.variants
        variants = "".join(f" ({name})" for _, name in own)
        title = (self.own.title or self.name.partition("+")[0].partition("@")[0]) + variants
        return f"{self.base.title} + {title}" if self.base else title

    @property
    def version(self) -> list[int]:
        return [self.own.version, *(self.base.version if self.base else [])]

    @property
    def modules(self) -> list[str]:
        """Names of the modules that hold the classes."""
        return [self.own.__module__, *(self.base.modules if self.base else [])]

    def own_settings(self) -> list[str]:
        """Names of the hyper-parameters that are the method's own, not every method's."""
        return [name for name in self.config.model_fields if name not in Settings.model_fields]


# ---- where they are ----------------------------------------------------------------------------------------


def _shipped_methods() -> dict[str, Entry[Found]]:
    """A file methods/<name>.py, or a folder methods/<name>/ for a method that brings a network."""
    folder = shipped.PACKAGE.parent / "methods"
    _claim("methods", folder)
    files = [path for path in folder.glob("*.py") if not path.stem.startswith("_")]
    folders = [path.parent for path in folder.glob("*/__init__.py")]
    return {
        path.stem.replace("_", "-"): Entry(
            functools.partial(_load, f"methods.{path.stem}"), f"methods/{path.name}"
        )
        for path in (*files, *folders)
    }


def _claim(name: str, folder: Path) -> None:
    """Import the package beside this one under its plain name, though the current folder may hold a module of
    that name."""
    found = sys.modules.get(name)
    if found is not None:
        if [Path(path).resolve() for path in getattr(found, "__path__", [])] != [folder.resolve()]:
            at = getattr(found, "__file__", "?")
            raise UserError(
                f"a module {name!r} of yours is in the way ({at}); import bench before it, or rename it"
            )
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not folder.is_dir():
        raise UserError(f"{folder}: the shipped methods are not there; install ciss-bench again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _load(target: str, wanted: str = "") -> Found:
    """Class and recipe of a module."""
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision"):
            raise
        cure = "write `from bench.lazy import F, torch` instead"
        raise UserError(f"method of {target}: imports {error.name} at its top; {cure}") from None
    classes = [c for c in vars(module).values() if _is_method(c) and c.__module__ == module.__name__]
    if wanted:
        classes = [c for c in classes if c.__name__ == wanted]
    if len(classes) != 1:
        what = f"must hold exactly one class derived from Method, it holds {len(classes)}"
        raise UserError(f"method of {target}: {module.__file__} {what}")
    return Found(classes[0], _recipe(module))


def _is_method(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Method)


def _recipe(module: ModuleType) -> Recipe:
    """The recipe beside a module: mib.toml beside mib.py, rcil/rcil.toml in the folder of
    rcil/__init__.py."""
    file = Path(str(module.__file__))
    path = file.parent / f"{file.parent.name}.toml" if file.stem == "__init__" else file.with_suffix(".toml")
    if not path.is_file():
        raise UserError(f"{path}: not there; a method has a recipe beside its module, be it empty")
    return read_recipe(path)


def _of_entry_point(point: importlib.metadata.EntryPoint) -> Found:
    return _load(point.module, point.attr)


def _import_all() -> None:
    """Networks and the like may come from a method's file: import them all."""
    METHODS.everything()


METHODS.finders.append(_shipped_methods)
METHODS.of_entry_point = _of_entry_point
for _registry in (NETWORKS, BODIES, CLASSIFIERS):
    _registry.providers.append(_import_all)


# ---- looking one up ----------------------------------------------------------------------------------------


def method_names() -> list[str]:
    """Every known method and wrapper."""
    return METHODS.known()


@functools.cache
def method(name: str) -> MethodSpec:
    """Look a method up: "mib", "mib@preset" (a variant of its recipe), "nest+mib" (one method around
    another).

    Raises:
        UserError: no such method or variant, or a composition that does not hold.
    """
    head, plus, rest = name.partition("+")
    plain, at, variant = head.partition("@")
    found = METHODS.find(plain)
    cls, recipe = found.cls, found.recipe
    variants: tuple[tuple[Recipe, str], ...] = ()
    if at:
        if variant not in recipe.variants:
            raise unknown("variant", variant, recipe.variants, where=f"method {plain!r}")
        variants = ((recipe, variant),)
    _check_around(recipe, bool(cls.wraps))
    if not cls.wraps:
        if plus:
            able = ", ".join(_wrappers()) or "none"
            raise UserError(f"{name}: {plain!r} does not wrap another method; those that do: {able}")
        recipe.check(cls.Config.model_fields)
        return MethodSpec(name, cls, cls, (recipe,), variants)
    if not plus:
        raise UserError(f"{plain!r} wraps another method; write for example {plain}+ft")
    base = method(rest)
    if base.cls.at_once or plain in [part.partition("@")[0] for part in rest.split("+")]:
        raise UserError(f"{name}: {plain!r} cannot wrap {rest!r}")
    if base.classifier not in cls.wraps:
        kinds = " or ".join(map(repr, cls.wraps))
        raise UserError(
            f"{name}: {plain!r} works on a classifier of kind {kinds}, and that of {rest!r} is "
            f"{base.classifier!r}"
        )
    rival = _initialiser(base)
    if rival and _initialises(cls):
        raise UserError(
            f"{name}: {plain!r} and {rival!r} both initialise the new classifier; take one of them"
        )
    both = _composed(cls, base.cls)
    recipe.check(both.Config.model_fields)
    for scoped in recipe.around.get(base.plain, {}).values():
        for place, key in scoped.every():
            if key not in both.Config.model_fields:
                raise unknown("setting", key, both.Config.model_fields, where=str(recipe.path.parent / place))
    return MethodSpec(name, both, cls, (*base.recipes, recipe), (*base.variants, *variants), base)


def _check_around(recipe: Recipe, wraps: bool) -> None:
    """Refuse tables [on.METHOD] that nothing would ever read: of a method that wraps none, or a slip of a
    known name."""
    for wrapped in recipe.around:
        where = f"{recipe.path}: [on.{wrapped}]"
        if not wraps:
            raise UserError(f"{where}: only a method that wraps others has settings around one of them")
        for part in wrapped.split("+"):
            if part not in METHODS and any(is_slip(part, name) for name in METHODS.known()):
                raise unknown("method", part, METHODS.known(), where)


def _initialises(wrapper: type[Method]) -> bool:
    """Whether a wrapper initialises the new classifier in the place of the method that it wraps."""
    return "init_classifier" in vars(wrapper)


def _initialiser(spec: MethodSpec | None) -> str:
    """The wrapper of a composition that initialises the new classifier; "" for none."""
    if spec is None or spec.base is None:
        return ""
    return spec.plain.partition("+")[0] if _initialises(spec.own) else _initialiser(spec.base)


def _composed(own: type[Method], base: type[Method]) -> type[Method]:
    """A wrapper's class before the wrapped one's, and so their settings."""
    about = {"__doc__": own.Config.__doc__, "__module__": own.__module__}
    members: dict[str, Any] = {
        "__doc__": own.__doc__,
        "__module__": own.__module__,
        "Config": type("Config", (own.Config, base.Config), about),
        "caveats": (*vars(own).get("caveats", ()), *base.caveats),
    }
    return type(own.__name__, (own, base), members)


def _wrappers() -> Iterator[str]:
    return (name for name, found in METHODS.everything()[0].items() if found.cls.wraps)
