"""The examples in docstrings are true, and no public function or class of the pure rooms is without one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    *(
        f"bench.{room}.{path.stem}"
        for room in ("score", "protocol")
        for path in sorted((ROOT / "bench" / room).glob("[!_]*.py"))
    ),
    "bench.method.losses",
]


def examples(module: ModuleType) -> dict[str, doctest.DocTest]:
    """The docstrings of a module's own functions, classes and methods, by name without the module's."""
    found = doctest.DocTestFinder(exclude_empty=False).find(module)
    return {test.name.removeprefix(f"{module.__name__}."): test for test in found}


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str, in_tmp: Path) -> None:
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in examples(importlib.import_module(name)).values():
        runner.run(test, out=told.append)
    assert runner.failures == 0, "".join(told)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_has_an_example(name: str) -> None:
    module = importlib.import_module(name)
    public = {
        word
        for word, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
        and not word.startswith("_")
    }
    assert public
    found = examples(module)
    assert [word for word in sorted(public) if not found[word].examples] == []
