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


@functools.cache
def _homes(top: str) -> tuple[Path, ...]:
    """Where a top-level package lies, its folders, or the file of a module; nothing is imported."""
    if top in (METHODS, ENGINE):
        return (shipped.PACKAGE.parent / top,)
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        return ()
    if spec.submodule_search_locations is not None:
        return tuple(Path(place) for place in spec.submodule_search_locations)
    return (Path(spec.origin),) if spec.origin and spec.origin.endswith(".py") else ()


def _path(file: str) -> Path | None:
    """Where a file is; None if it is not there."""
    top, *rest = file.split("/")
    paths = (home.joinpath(*rest) for home in _homes(top if rest else top.removesuffix(".py")))
    return next((path for path in paths if path.is_file()), None)


def _file(module: str) -> str | None:
    """A module's name as a file's; None if there is no such file."""
    stem = module.replace(".", "/")
    return next((file for file in (f"{stem}.py", f"{stem}/__init__.py") if _path(file)), None)


def installed(file: str) -> str | None:
    """Digest of a file as it is installed now.

    Returns:
        None if its whole package is gone, and with it what could be compared; "" if the file alone is.
    """
    path = _path(file)
    if path is not None:
        return digest(path)
    return "" if _homes(file.partition("/")[0].removesuffix(".py")) else None


# ---- what a job runs ---------------------------------------------------------------------------------------


def files(module: str) -> dict[str, str]:
    """Digests of a module's file (of its whole folder, if it is one) and of all that it imports.

    Imports are followed within methods/ and within the module's own package, or to what stands beside it in
    a folder of one's own; not to bench, which `engine` tells, nor to other installed packages.
    """
    start = _file(module)
    if start is None:
        return {}
    ahead = [start]
    if start.endswith("/__init__.py"):
        folder, path = start.removesuffix("__init__.py"), _path(start)
        assert path is not None
        ahead += [folder + other.relative_to(path.parent).as_posix() for other in path.parent.rglob("*.py")]
    found: dict[str, str] = {}
    while ahead:
        file = ahead.pop()
        path = None if file in found else _path(file)
        if path is not None:
            found[file] = digest(path)
            mine = (name for name in _imported(file, path) if _follows(module, name))
            ahead += [other for other in map(_file, mine) if other]
    return dict(sorted(found.items()))


def _imported(file: str, path: Path) -> Iterator[str]:
    """Modules that a file imports, and packages that they are in; names of functions may be among them."""
    package = file.split("/")[:-1]
    about = path.stat()
    for base, level, names in _read(str(path), about.st_mtime_ns, about.st_size)[1]:
        parts = [*package[: len(package) - level + 1], *base.split(".")] if level else base.split(".")
        whole = [part for part in parts if part]
        yield from (".".join(whole[: n + 1]) for n in range(len(whole)))
        yield from (".".join((*whole, name)) for name in names)


def _follows(module: str, other: str) -> bool:
    """Whether the code of another module counts as a module's own."""
    own, top = module.partition(".")[0], other.partition(".")[0]
    if top in (own, METHODS):
        return True
    if top == ENGINE or own == METHODS:
        return False
    beside = {home.parent for home in _homes(own)} & {home.parent for home in _homes(top)}
    return any(folder.name not in ("site-packages", "dist-packages") for folder in beside)


@functools.cache
def engine() -> dict[str, str]:
    """Digests of the parts of bench/ that decide a job's numbers: "bench/train", "bench/seeds.py"."""
    found: dict[str, str] = {}
    for part in ENGINE_PARTS:
        at = shipped.PACKAGE / part
        whole = hashlib.blake2b(digest_size=8)
        for path in [at] if at.is_file() else sorted(at.rglob("*.py")):
            whole.update(f"{path.relative_to(shipped.PACKAGE).as_posix()} {digest(path)}\n".encode())
        found[f"{ENGINE}/{part}"] = whole.hexdigest()
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
