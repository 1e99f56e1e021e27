"""Which code is installed: digests of files that change when what they do changes, and a commit where there
is one.

A digest is of a file's syntax tree without docstrings, so comments, formatting and words about the code leave
it alone. Files are parsed, never imported: a login node has no torch.

Files are named by their path from the folder that their package stands in: "methods/mib.py",
"their_package/net.py", "their_method.py".
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench import shipped

METHODS, ENGINE = "methods", "bench"
ENGINE_PARTS = (
    "data", "models", "protocol", "score", "method", "train", "seeds.py", "distributed.py", "lazy.py"
)  # fmt: skip
"""What of bench/ decides a job's numbers. Plans, stores, launchers, reports and commands do not."""
NOT_DECISIVE = ("method/skeleton.py",)
GIT_SECONDS = 20.0

# ---- digests -----------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """16 hexadecimal digits that change when the code of a file does."""
    about = path.stat()
    return _read(str(path), about.st_mtime_ns, about.st_size)[0]


@functools.lru_cache(maxsize=4096)
def _read(path: str, modified: int, size: int) -> tuple[str, tuple[tuple[str, int, tuple[str, ...]], ...]]:
    """(digest, imports) of a file as it stood at that time."""
    content = Path(path).read_bytes()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # its own writer will hear of it
        return hashlib.blake2b(content, digest_size=8).hexdigest(), ()
    found = hashlib.blake2b(digest_size=8)
    for word in _words(tree):
        found.update(word.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest(), tuple(_imports(tree))


def _words(node: object) -> Iterator[str]:
    """A syntax tree as words.

    Not `ast.dump`: that differs between versions of Python, whose new fields are empty in older code.
    """
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                value = [one for one in value if not _is_docstring(one)]
            if name == "kind" or (value is None and not isinstance(node, ast.Constant)) or value == []:
                continue
            yield name
            yield from _words(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for one in node:
            yield from _words(one)
        yield "]"
    else:
        yield f"{type(node).__name__} {node!r}"


def _is_docstring(node: object) -> bool:
    """Also one after a variable: a string that stands alone does nothing."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _imports(tree: ast.AST) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """(module, level of a relative import, names) of each import, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, tuple(alias.name for alias in node.names)


# ---- where packages lie ------------------------------------------------------------------------------------


def _homes(top: str) -> list[Path]:
    """Where a top-level package lies, its folders, or the file of a module; nothing is imported."""
    if top in (METHODS, ENGINE):
        return [shipped.PACKAGE.parent / METHODS if top == METHODS else shipped.PACKAGE]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place) for place in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def _locate(module: str) -> tuple[str, Path] | None:
    """A module's name as a file, and the file."""
    top, *rest = module.split(".")
    for home in _homes(top):
        if home.suffix == ".py":
            if not rest:
                return f"{top}.py", home
            continue
        for tail in ((*rest[:-1], f"{rest[-1]}.py") if rest else (), (*rest, "__init__.py")):
            path = home.joinpath(*tail)
            if tail and path.is_file():
                return "/".join((top, *tail)), path
    return None


def installed(file: str) -> str | None:
    """Digest of a file as it is installed now.

    Returns:
        None if its whole package is gone, and with it what could be compared; "" if the file alone is.
    """
    top, *rest = file.split("/")
    homes = _homes(top if rest else top.removesuffix(".py"))
    for home in homes:
        path = home.joinpath(*rest)
        if path.is_file():
            return digest(path)
    return "" if homes else None


# ---- what a job runs ---------------------------------------------------------------------------------------


def files(module: str) -> dict[str, str]:
    """Digests of a module's file (of its whole folder, if it is one) and of all that it imports.

    Imports are followed within methods/ and within the module's own package, also to single modules beside
    it; neither to bench, which `engine` tells, nor to other packages, whose versions are recorded.
    """
    start = _locate(module)
    if start is None:
        return {}
    ahead = [(module, *start)]
    if start[1].name == "__init__.py":
        folder = start[1].parent
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((module, *(parts[:-1] if parts[-1] == "__init__" else parts)))
            ahead.append((name, "/".join((*module.split("."), *path.relative_to(folder).parts)), path))
    found: dict[str, str] = {}
    while ahead:
        name, file, path = ahead.pop()
        if file in found:
            continue
        found[file] = digest(path)
        for other in _imported(name, path):
            at = _locate(other)
            if at is not None and at[0] not in found:
                ahead.append((other, *at))
    return dict(sorted(found.items()))


def _imported(module: str, path: Path) -> Iterator[str]:
    """Modules, of those that count, that a module imports; the packages that they are in come with them."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    about = path.stat()
    for base, level, names in _read(str(path), about.st_mtime_ns, about.st_size)[1]:
        if level:
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - level + 1], *([base] if base else [])])
        for other in (base, *(f"{base}.{name}" for name in names)):
            parts = other.split(".")
            if _counts(parts[0], module.partition(".")[0]):
                # the shipped methods' own __init__ holds nothing, whoever imports one of them
                yield from (
                    name for n in range(1, len(parts) + 1) if (name := ".".join(parts[:n])) != METHODS
                )


def _counts(top: str, own: str) -> bool:
    """Whether imports of a package are followed from another."""
    if top in (METHODS, own):
        return top != ""
    if top == ENGINE or own == METHODS:
        return False
    here, there = _homes(own), _homes(top)
    if not here or not there or here[0].parent != there[0].parent:
        return False
    if here[0].parent.name not in ("site-packages", "dist-packages"):
        return True
    bringing = _distributions()
    return bool(set(bringing.get(own, ())) & set(bringing.get(top, ())))


@functools.cache
def _distributions() -> dict[str, list[str]]:
    """Names of the distributions that bring each top-level package."""
    return {top: list(names) for top, names in importlib.metadata.packages_distributions().items()}


def engine() -> dict[str, str]:
    """Digests of the parts of bench/ that decide a job's numbers: "train", "seeds.py"."""
    found: dict[str, str] = {}
    for part in ENGINE_PARTS:
        at = shipped.PACKAGE / part
        if at.is_file():
            found[part] = digest(at)
        elif at.is_dir():
            whole = hashlib.blake2b(digest_size=8)
            for path in sorted(at.rglob("*.py")):
                name = path.relative_to(shipped.PACKAGE).as_posix()
                if name not in NOT_DECISIVE:
                    whole.update(f"{name} {digest(path)}\n".encode())
            found[part] = whole.hexdigest()
    return found


def commit() -> str | None:
    """The commit of the checkout that this code runs from; "-dirty" if it differs, or holds new Python files.

    None where the code is not the repository itself, for example a virtual environment within somebody's
    thesis, and where git is not there or does not answer.
    """
    root = shipped.PACKAGE.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return None
    name = _git(root, "rev-parse", "--short=12", "HEAD")
    if not name:
        return None
    edited = _git(root, "status", "--porcelain", "--untracked-files=no")
    new = _git(root, "ls-files", "--others", "--exclude-standard", "--", "*.py")
    return name if edited == new == "" else f"{name}-dirty"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None if it says nothing that can be used."""
    # Within a hook these would name another repository than the folder's.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env={**clean, "GIT_OPTIONAL_LOCKS": "0"}, capture_output=True,
            text=True, check=False, timeout=GIT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
