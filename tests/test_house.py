"""The house itself: who imports whom, computed from the source by a parser of our own.
docs/explanation/architecture.md says why."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = 12
ROOMS = 30

ORDER = [
    *("errors", "lazy", "seeds", "shipped", "progress", "files", "names", "provenance", "distributed"),
    *(
        "data",
        "models",
        "protocol",
        "score",
        "store",
        "method",
        "plan",
        "train",
        "report",
        "launch",
        "doctor",
    ),
    *("api", "testing", "commands", "cli"),
]
"""The rooms of bench/ from the ground up: each imports only from those before it. A file of bench/ itself is
a room, too."""

LOGIN_NODE = ("cli", "api", "commands", "doctor", "launch", "report", "plan", "store", "score", "protocol")
"""What runs where no torch is: none of it, nor what it imports when it is imported, imports torch."""
FACE = "bench"
"""`import bench`: what it hands on belongs to the rooms below it."""
FORBIDDEN = ("torch", "torchvision", "inplace_abn")


class Import:
    """One import: of which module, which name of it, and whether it happens when the importing module is
    imported."""

    def __init__(self, module: str, name: str, at_once: bool) -> None:
        self.module, self.name, self.at_once = module, name, at_once


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of bench/ and methods/ by name."""
    return {
        module_name(path): path
        for folder in ("bench", "methods")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


@functools.cache
def imports(name: str) -> list[Import]:
    """All imports of a module, also those inside functions and for type checkers."""
    return list(_imports(ast.parse(modules()[name].read_text(encoding="utf-8")), True))


def _imports(node: ast.AST, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, "", at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are absolute"
            yield from (Import(str(child.module), alias.name, at_once) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for inner in child.body:
                yield from _imports(ast.Module([inner], []), False)
            yield from _imports(ast.Module(child.orelse, []), at_once)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, at_once and not inside)


def target(found: Import) -> str | None:
    """The module of ours that an import loads; the submodule where the name is one."""
    inner = f"{found.module}.{found.name}"
    return inner if inner in modules() else found.module if found.module in modules() else None


def room(module: str) -> str:
    """ "bench.plan.keys" is in room "plan", "methods.mib" in "methods"."""
    parts = module.split(".")
    return parts[0] if parts[0] != "bench" or len(parts) == 1 else parts[1]


def arrows(at_once: bool = False) -> dict[str, set[str]]:
    """Modules that each module imports, packages' faces as themselves."""
    found: dict[str, set[str]] = {}
    for name in modules():
        to = {target(one) for one in imports(name) if one.at_once or not at_once}
        found[name] = {t for t in to if t and t != name}
    return found


def between_rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, to in arrows().items():
        if name != FACE:
            found.setdefault(room(name), set()).update(
                room(t) for t in to if t != FACE and room(t) != room(name)
            )
    return found


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A circle of a graph, or an empty list."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(node: str) -> list[str]:
        state[node] = 1
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        path.pop()
        state[node] = 2
        return []

    return next((found for node in sorted(graph) if node not in state and (found := visit(node))), [])


def test_there_is_no_circle_among_rooms() -> None:
    assert circle(between_rooms()) == []


def test_there_is_no_circle_among_files() -> None:
    faces = {name for name, path in modules().items() if path.name == "__init__.py"}
    graph = {name: {t for t in to if t not in faces} for name, to in arrows().items() if name not in faces}
    assert circle(graph) == []


def test_arrows_run_down_only() -> None:
    place = {name: i for i, name in enumerate(ORDER)}
    upward = [
        f"{name} -> {t}"
        for name, to in arrows().items()
        for t in to
        if room(name) in place and room(t) in place and place[room(t)] > place[room(name)]
    ]
    assert upward == []


def test_every_room_has_its_place() -> None:
    here = {room(name) for name in modules()} - {"bench", "methods", "__main__"}
    assert here == set(ORDER)


def test_the_house_is_not_high_and_has_few_rooms() -> None:
    graph = between_rooms()
    floor = functools.cache(lambda node: 1 + max((floor(other) for other in graph.get(node, ())), default=0))
    assert max(floor(node) for node in graph) <= FLOORS
    assert len(graph) <= ROOMS


def test_bench_knows_no_method() -> None:
    assert [
        name
        for name in modules()
        if name.startswith("bench")
        for one in imports(name)
        if one.module.startswith("methods")
    ] == []


def test_methods_see_the_face_of_bench_method_and_little_else() -> None:
    allowed = ("bench.method", "bench.lazy", "bench.errors", "bench.distributed", "bench.models")
    strange = [
        f"{name} -> {one.module}"
        for name in modules()
        if name.startswith("methods")
        for one in imports(name)
        if one.module.startswith("bench")
        and not (one.module in allowed or one.module.startswith("bench.models."))
    ]
    assert strange == []


def read_by_planning(name: str) -> bool:
    """Whether a login node imports a module: of a method that is a folder, its `__init__` only."""
    method = room(name) == "methods" and name.count(".") < 2
    return method or room(name) in LOGIN_NODE or name == "bench.method"


@pytest.mark.parametrize("start", [name for name in modules() if read_by_planning(name)])
def test_no_torch_on_a_login_node(start: str) -> None:
    """Neither the module nor anything that it imports as it is imported imports torch."""
    graph, seen, ahead = arrows(at_once=True), {start}, [start]
    while ahead:
        for other in graph[ahead.pop()]:
            parents = {other, *(other.rsplit(".", n)[0] for n in range(1, other.count(".") + 1))}
            new = {p for p in parents if p in graph} - seen
            seen |= new
            ahead += new
    heavy = [
        f"{name} imports {one.module}"
        for name in seen
        for one in imports(name)
        if one.at_once and one.module.split(".")[0] in FORBIDDEN
    ]
    assert heavy == []


def crossing() -> dict[str, set[str]]:
    """Names of each module that other rooms import."""
    found: dict[str, set[str]] = {}
    for name in modules():
        for one in imports(name):
            if one.module in modules() and room(one.module) != room(name):
                found.setdefault(one.module, set()).add(one.name)
    return found


def annotated(node: ast.AST) -> Iterator[ast.expr]:
    """Annotations of a function or of a class's fields and public methods."""
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        yield from (a.annotation for a in arguments if a.annotation)
        if node.returns:
            yield node.returns
    elif isinstance(node, ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                yield from annotated(inner)
            elif isinstance(inner, ast.AnnAssign):
                yield inner.annotation


BETWEEN_METHOD_AND_ENGINE = {
    "bench.method.interface",
    "bench.method.regulariser",
    "bench.method.batch",
    "bench.method.step_data",
}
"""A method's state, its recorders' settings and a loader's batch are open by design: plug-ins decide what is
in them."""


def test_no_untyped_dictionary_crosses_a_room() -> None:
    untyped = []
    for module, names in crossing().items():
        if module in BETWEEN_METHOD_AND_ENGINE:
            continue
        for node in ast.parse(modules()[module].read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
                for annotation in annotated(node):
                    text = ast.unparse(annotation)
                    if "dict[str, Any]" in text or "Mapping[str, Any]" in text:
                        untyped.append(f"{module}.{node.name}: {text}")
    assert untyped == []
