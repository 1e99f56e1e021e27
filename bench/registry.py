"""The registry: methods by name, their classes and recipes. It finds them; nothing is listed anywhere."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import shipped
from bench.errors import UserError, unknown
from bench.method import Method
from bench.recipe import Settings, read_toml

if TYPE_CHECKING:
    from bench.protocol import Protocol

ENTRY_POINTS = "bench.methods"


@dataclass(frozen=True)
class MethodSpec:
    """A method as it was asked for: "mib", a variant of its recipe "mib@preset", or one around another, "nest+mib".

    Attributes:
        name: as written.
        cls: the class; for a composition the wrapper's.
        config: the class of its hyper-parameters; for a composition both methods' together.
        recipes: (path, content) of the recipe files, the wrapped method's first.
        variants: (path, name, values) of the chosen variants.
        base: the wrapped method, or None.
    """

    name: str
    cls: type[Method]
    config: type[Settings]
    recipes: tuple[tuple[Path, Mapping[str, Any]], ...] = field(repr=False)
    variants: tuple[tuple[Path, str, Mapping[str, Any]], ...] = field(default=(), repr=False)
    base: MethodSpec | None = None

    def build(self, config: Any) -> Method:
        """An instance with these hyper-parameters."""
        if self.base is None:
            return self.cls(config)
        return self.cls(config, self.base.build(config))  # type: ignore[call-arg]

    @property
    def first_step(self) -> str:
        """Name of the method whose step 0 this one builds on; its own if it has one."""
        if self.base is not None:
            return self.base.first_step
        return self.cls.first_step or self.name.partition("@")[0]

    @property
    def classifier(self) -> str:
        return self.base.classifier if self.base else self.cls.classifier

    @property
    def title(self) -> str:
        own = self.variants[len(self.base.variants) :] if self.base else self.variants
        variants = "".join(f" ({name})" for _, name, _ in own)
        title = (self.cls.title or self.name.partition("@")[0]) + variants
        return f"{self.base.title} + {title}" if self.base else title

    @property
    def version(self) -> list[int]:
        return [self.cls.version, *(self.base.version if self.base else [])]

    def check(self, config: Any, protocol: Protocol) -> None:
        """Raise UserError for what these hyper-parameters cannot do on this protocol."""
        self.cls.check(config, protocol)
        if self.base:
            self.base.check(config, protocol)

    def footnotes(self, config: Any) -> list[str]:
        return [*self.cls.footnotes(config), *(self.base.footnotes(config) if self.base else [])]

    def own_settings(self) -> list[str]:
        """Names of the hyper-parameters that are the method's own, not every method's."""
        return [name for name in self.config.model_fields if name not in Settings.model_fields]


def _files() -> dict[str, str]:
    """Module of every shipped method by method name."""
    folder = shipped.PACKAGE.parent / "methods"
    _claim("methods", folder)
    return {path.stem.replace("_", "-"): f"methods.{path.stem}" for path in folder.glob("*.py") if not path.stem.startswith("_")}


def _claim(name: str, folder: Path) -> None:
    """Import the package beside this one under its plain name, though the current folder may hold a module of that name too."""
    found = sys.modules.get(name)
    if found is not None:
        if [Path(path).resolve() for path in getattr(found, "__path__", [])] != [folder.resolve()]:
            raise UserError(f"a module {name!r} of yours is in the way ({getattr(found, '__file__', '?')}); import bench before it, or rename it")
        return
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None or not folder.is_dir():
        raise UserError(f"{folder}: the shipped methods are not there; install ciss-bench again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


@functools.cache
def _modules() -> dict[str, str]:
    """Module (or module:class) of every method: the shipped ones, then those of installed packages."""
    found = _files()
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name in found:
            raise UserError(f"entry point {point.name!r} of {ENTRY_POINTS} ({point.value}) has the name of another method")
        found[point.name] = point.value
    return found


def method_names() -> list[str]:
    """Every known method."""
    return sorted(_modules())


def _load(name: str) -> tuple[type[Method], Path]:
    """Class and file of a method."""
    if name not in _modules():
        raise unknown("method", name, _modules())
    target, _, wanted = _modules()[name].partition(":")
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision"):
            raise
        raise UserError(f"method {name!r} ({target}) imports {error.name} at its top; write `from bench.lazy import F, torch` instead") from None
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == module.__name__]
    if wanted:
        classes = [c for c in classes if c.__name__ == wanted]
    if len(classes) != 1:
        raise UserError(f"method {name!r}: {module.__file__} must hold exactly one class derived from Method, it holds {len(classes)}")
    return classes[0], Path(str(module.__file__))


@functools.cache
def method(name: str) -> MethodSpec:
    """Look a method up: "mib", "mib@preset" (a variant of its recipe), "nest+mib" (one method around another).

    Raises:
        UserError: no such method or variant, or a composition that does not hold.
    """
    head, plus, rest = name.partition("+")
    plain, at, variant = head.partition("@")
    cls, file = _load(plain)
    path = file.with_suffix(".toml")
    recipe = read_toml(path)
    variants: tuple[tuple[Path, str, Mapping[str, Any]], ...] = ()
    if at:
        known = recipe.get("variant", {})
        if variant not in known:
            raise unknown("variant", variant, known, where=f"method {plain!r}")
        variants = ((path, variant, known[variant]),)
    config: type[Settings] = cls.Config
    if not cls.wraps:
        if plus:
            raise UserError(f"{name}: {plain!r} does not wrap another method; those that do: {', '.join(_wrappers()) or 'none'}")
        return MethodSpec(name, cls, config, ((path, recipe),), variants)
    if not plus:
        raise UserError(f"{plain!r} wraps another method; write for example {plain}+ft")
    base = method(rest)
    if base.cls.wraps or base.cls.at_once:
        raise UserError(f"{name}: {plain!r} cannot wrap {rest!r}")
    if base.classifier != cls.classifier:
        raise UserError(f"{name}: {plain!r} works on a classifier of kind {cls.classifier!r}, and that of {rest!r} is {base.classifier!r}")
    both = type("Config", (config, base.config), {"__doc__": config.__doc__, "__module__": config.__module__})
    return MethodSpec(name, cls, both, (*base.recipes, (path, recipe)), (*base.variants, *variants), base)


def _wrappers() -> Iterator[str]:
    return (name for name in method_names() if _load(name)[0].wraps)
