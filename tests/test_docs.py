"""Every block of README.md, CONTRIBUTING.md and docs/ is held to what it says.

A block is what stands between ``` or is indented by four spaces. An HTML comment above it may mark it:

    <!-- example: PATH -->       the content of a file, which the page's commands then find
    <!-- output of: COMMAND -->  what a command prints, word for word; the test runs it
    <!-- run -->                 commands that the test runs, in an empty folder
    <!-- not run: REASON -->     neither; its commands are still parsed

Without a mark, commands are parsed by the real parsers and planned without data, TOML is read by its reader,
Python is compiled and its calls of `bench` are bound. A block that is none of these fails.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import bench
from bench import cli
from bench.commands import options
from bench.commands.show import show_method, show_protocol
from bench.data.dataset import Dataset, load_dataset
from bench.data.index import ClassIndex
from bench.errors import UserError
from bench.files import read_toml
from bench.launch.profile import PROFILES, Profile
from bench.method.recipe import TRACKS, read_recipe
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.protocol.file import PROTOCOLS, load
from bench.score.conventions import CONVENTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLLOWED = ("docs/add-a-method.md", "docs/how-to/network-of-your-own.md")
"""Pages that another test follows word for word (tests/follow.py): here their commands are only parsed."""
SHELL = ("cd", "mkdir", "export", "git", "tar", "unzip", "squeue", "less", "cat", "ls")
"""Programs that are not ours."""


# ---- blocks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page: relative to the checkout.
        line: where it begins, from 1.
        mark: of the HTML comment above it; "" for none.
        kind: the word behind ```; "" for an indented block.
        text: without the indentation.
    """

    page: str
    line: int
    mark: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> Iterator[Block]:
    """The blocks of a page in their order."""
    lines = text.splitlines()
    at, mark, in_list = 0, "", False
    while at < len(lines):
        line, blank_before = lines[at], not at or not lines[at - 1].strip()
        begun = at
        if found := re.fullmatch(r"<!-- (.*) -->", line):
            mark = found[1]
            at += 1
            continue
        if fence := re.fullmatch(r"( *)```(\w*).*", line):
            at += 1
            while at < len(lines) and lines[at].strip() != "```":
                at += 1
            inner = [one.removeprefix(fence[1]) for one in lines[begun + 1 : at]]
            yield Block(page, begun + 1, mark, fence[2] or "text", "\n".join(inner) + "\n")
        elif line.startswith("    ") and blank_before and not in_list:
            while at + 1 < len(lines) and (lines[at + 1].startswith("    ") or not lines[at + 1].strip()):
                at += 1
            inner = [one[4:] for one in lines[begun : at + 1]]
            yield Block(page, begun + 1, mark, "", "\n".join(inner).rstrip() + "\n")
        elif line.strip():
            in_list = bool(re.match(r" *([-*]|\d+\.) ", line)) or (in_list and line.startswith(" "))
        if line.strip():
            mark = ""
        at += 1


def all_blocks() -> list[Block]:
    return [
        block
        for path in PAGES
        for block in blocks(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]


def brought(block: Block) -> set[str]:
    """Files that the page of a block brings: its examples, and copies that its commands make."""
    text = (ROOT / block.page).read_text() if (ROOT / block.page).is_file() else ""
    named = set(re.findall(r"<!-- example: (\S+) -->", text))
    return named | set(re.findall(r"^ *cp \S+ (\S+)$", text, re.MULTILINE))


# ---- commands ----------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """Words of each command, without assignments before it and redirections behind it."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("&&", " && "), comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ">", ";")), len(words))
            command = words[:end]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            if command:
                found.append(command)
            redirected = end < len(words) and words[end] == ">"
            words = words[end + (2 if redirected else 1) :]
    return found


def is_ours(words: list[str]) -> bool:
    return program(words) in CHECKS or words[0] in SHELL


def program(words: list[str]) -> str:
    """ "bench" of `.venv/bin/bench` and `python -m bench`."""
    name = words[0].rpartition("/")[2]
    return "python" if name == "python3" else name


def check_bench(words: list[str], block: Block) -> None:
    """A line of the command, as the command itself reads it."""
    if words[1:] in (["--help"], ["--version"]):
        return
    assert words[1] in cli.COMMANDS, f"bench has no command {words[1]!r}"
    if "--help" in words:
        return
    args = cli.parser(words[1]).parse_args(words[2:])
    if block.page in FOLLOWED:
        return
    if words[1] in ("run", "plan"):
        planned(
            options.names(args.protocol), options.names(args.methods), args.track, options.seeds(args.seeds),
            args.overrides, args.setting, files=brought(block), page=block.page,
        )  # fmt: skip
        profile = getattr(args, "profile", None)
        if profile and profile not in brought(block):
            PROFILES.find(profile)
    elif words[1] == "show" and args.kind == "protocol":
        if args.name not in brought(block):
            show_protocol(args.name, args.setting)
    elif words[1] == "show":
        show_method(args.name, args.protocol, args.track, args.overrides)
    elif words[1] == "report":
        CONVENTIONS.find(args.convention)
        for name in options.names(args.protocol or ""):
            PROTOCOLS.match([name])


def planned(
    protocols: list[str], methods: list[str], track: str | None = None, seeds: Any = (0,),
    overrides: Any = (), setting: str | None = None, *, files: set[str], page: str,
) -> Plan:  # fmt: skip
    """A plan of these words for data that show every class often enough."""
    found = []
    for name in protocols:
        if name in files:
            path = Path(name)
            path.write_text(example(page, name))
            found += [load(str(path), setting)]
        else:
            found += [load(one, setting) for one in PROTOCOLS.match([name])]
    indexes = {p.dataset.name: dict.fromkeys(("train", "test"), index_of(p.dataset)) for p in found}
    weights = [word for word in overrides if not word.partition("=")[0].endswith("pretrained")]
    return make_plan(found, methods, track, seeds, weights, indexes=indexes)


def index_of(dataset: Dataset) -> ClassIndex:
    """An index of a hundred images for each class."""
    n = len(dataset.classes) - 1
    shown = tuple(1 << 1 + i % n | 1 for i in range(100 * n))
    return ClassIndex(tuple(f"i{i}" for i in range(len(shown))), shown, "f" * 16)


def example(page: str, name: str) -> str:
    return next(
        block.text for block in blocks(page, (ROOT / page).read_text()) if block.mark == f"example: {name}"
    )


def check_python(words: list[str], block: Block) -> None:
    if words[1] == "-m":
        assert words[2] in ("venv", "bench", "pip"), words
        if words[2] == "bench":
            check_bench(words[2:], block)
        return
    script = ROOT / words[1]
    assert script.is_file() or words[1] in brought(block), f"no script {words[1]}"
    source = script.read_text() if script.is_file() else ""
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{words[1]} has no option {option}"


def check_pip(words: list[str], block: Block) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for before, word in itertools.pairwise(words):
        if before == "-c":
            assert (ROOT / word).is_file(), f"no {word}"
        if wanted := re.fullmatch(r"\.\[(\w+)\]", word):
            assert wanted[1] in extras, f"no extra {wanted[1]}"


def check_pytest(words: list[str], block: Block) -> None:
    for word in words[1:]:
        if word.startswith("-"):
            assert re.search(rf"^\s+{re.escape(word)}\b", pytest_help(), re.MULTILINE), f"no option {word}"
        else:
            assert (ROOT / word).exists() or block.page in FOLLOWED, f"no {word}"


@functools.cache
def pytest_help() -> str:
    """The options of pytest and of the plug-ins that the tests' extra installs."""
    asked = [sys.executable, "-m", "pytest", "--help"]
    return subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def check_copy(words: list[str], block: Block) -> None:
    assert (ROOT / words[1]).exists() or words[1].startswith("~"), f"no {words[1]}"


def check_one_machine(words: list[str], block: Block) -> None:
    assert words[1] in ("start", "stop", "run")
    if "--" in words:
        check_command(words[words.index("--") + 1 :], block)


def check_mkdocs(words: list[str], block: Block) -> None:
    assert words[1] in ("serve", "build")


CHECKS = {
    "bench": check_bench,
    "python": check_python,
    "pip": check_pip,
    "pytest": check_pytest,
    "cp": check_copy,
    "one-machine": check_one_machine,
    "mkdocs": check_mkdocs,
    "source": lambda words, block: None,
}


def check_command(words: list[str], block: Block) -> None:
    if words[0] not in SHELL:
        CHECKS[program(words)](words, block)


# ---- the other kinds ---------------------------------------------------------------------------------------


def check_toml(text: str, name: str) -> str:
    """What a TOML text is, read by the reader of such files."""
    content = tomllib.loads(text)
    path = Path(name or "unnamed.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if "classes" in content:
        load_dataset(str(path))
        return "data set"
    if "dataset" in content:
        load(str(path))
        return "protocol"
    if any(key in ("method", "variant", "on", *TRACKS.known()) for key in content):
        read_recipe(path)
        return "recipe"
    if content and content.keys() <= Profile.model_fields.keys():
        read_toml(path, Profile)
        return "profile"
    raise AssertionError("TOML that no reader knows")


def check_program(text: str, block: Block) -> None:
    """Python: it compiles, its imports hold, and what it calls of `bench` takes these arguments."""
    tree = ast.parse(text)
    compile(tree, str(block), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("torch"):
            module = importlib.import_module(node.module) if not _of_page(node.module, block) else None
            for alias in node.names:
                assert module is None or hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        called = node.func if isinstance(node, ast.Call) else None
        if (
            isinstance(called, ast.Attribute)
            and isinstance(called.value, ast.Name)
            and called.value.id == "bench"
        ):
            assert isinstance(node, ast.Call)
            arguments = [ast.literal_eval(value) for value in node.args]
            named = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
            inspect.signature(getattr(bench, called.attr)).bind(*arguments, **named)
            if called.attr == "run":
                protocol, methods = ([one] if isinstance(one, str) else list(one) for one in arguments[:2])
                planned(protocol, methods, seeds=named.get("seeds", [0]), files=set(), page=block.page)


def _of_page(module: str, block: Block) -> bool:
    """Whether a module is one that the page brings."""
    path = module.replace(".", "/")
    return bool({f"{path}.py", f"{path}/__init__.py"} & brought(block))


def classify(block: Block) -> str:
    """What a block is; AssertionError or UserError if it does not hold, or if it is nothing known."""
    word, _, rest = block.mark.partition(": ")
    lines = [line for line in block.text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if word == "example":
        if rest.endswith(".toml"):
            return check_toml(block.text, rest)
        assert rest.endswith(".py"), f"{rest}: a file of a kind that no test reads"
        check_program(block.text, block)
        return "file"
    if word == "output of":
        done = run_line(rest)
        assert done.stdout.split("\n") == block.text.split("\n"), done.stdout
        return "output"
    if word == "not run":
        assert len(rest.split()) > 2, f"no reason: {rest!r}"
        for line in lines:
            if line.startswith("bench "):
                for command in commands(line):
                    check_command(command, block)
        return "excused"
    if block.kind == "toml":
        return check_toml(block.text, "")
    if block.kind == "python" or re.match(r"(import|from) ", block.text):
        check_program(block.text, block)
        return "program"
    if block.kind in ("", "console", "sh") and all(is_ours(words) for words in _words(block.text)):
        for words in commands(block.text):
            check_command(words, block)
        if block.mark == "run":
            for line in lines:
                done = run_line(line)
                assert done.returncode == 0, done.stdout + done.stderr
            return "run"
        return "commands"
    if block.page.startswith("docs/spec/") and not any(line.split()[0] == "bench" for line in lines):
        return "formula"
    raise AssertionError("neither commands, TOML nor Python; mark it (tests/test_docs.py says how)")


def _words(text: str) -> list[list[str]]:
    try:
        return commands(text)
    except ValueError:  # quotes that do not close: prose
        return [[""]]


def run_line(line: str) -> subprocess.CompletedProcess[str]:
    """A command in the current folder, as a reader types it; it never trains."""
    words = shlex.split(line)
    assert program(words) == "bench", f"only lines of bench are run: {line}"
    assert words[1] not in ("run", "doctor"), f"it would train, or print what is here: {line}"
    return subprocess.run(
        [sys.executable, "-m", "bench", *words[1:]], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("block", all_blocks(), ids=str)
def test_block(block: Block, in_tmp: Path) -> None:
    try:
        classify(block)
    except (AssertionError, UserError, SystemExit) as wrong:
        pytest.fail(f"{block}: {wrong}\n{block.text}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("    bench run --protocol voc-15-1 --methods mibb\n", "mib"),
        ("    bench run --protocol voc-15-2 --methods mib\n", "voc-15-"),
        ("    bench run --protocol voc-15-1 --methods mib --fast\n", "--fast"),
        ("    bench train --protocol voc-15-1\n", "train"),
        ("    bench report --convention mibb\n", "mib"),
        ("    bench run --protocol voc-15-1 --methods mib --set distilation=1\n", "distillation"),
        ("    python tests/fault.py\n", "tests/fault.py"),
        ("    pytest --covv\n", "--covv"),
        ("    pip install -c constraints.txt -e '.[doc]'\n", "doc"),
        ("    cp slurm/defaults.toml my.toml\n", "slurm/defaults.toml"),
        ("    a table of some kind\n", "mark it"),
        ("```toml\ncolour = 3\n```\n", "no reader"),
        ('```toml\ndataset = "voc"\nfirts = 12\n```\n', "first"),
        ('```python\nimport bench\nbench.run("shapes-6-2", "ft", seed=1)\n```\n', "seed"),
        ("```python\nfrom bench.method import Latter\n```\n", "Latter"),
        ("<!-- output of: bench list tracks -->\n```text\nname\n```\n", "published"),
        ("<!-- not run: long -->\n\n    what is printed\n", "no reason"),
    ],
)
def test_what_does_not_hold_is_noticed(
    text: str, why: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks("README.md", text)
    with pytest.raises((AssertionError, UserError, SystemExit, TypeError)) as wrong:
        classify(block)
    assert why in str(wrong.value) + capsys.readouterr().err


def test_a_report_after_a_run(toy: Callable[..., Path], quick: list[str]) -> None:
    """As the README has it: what a run imports leaves `bench.report` the function that it was."""
    run = bench.run(str(toy(then=2)), "ft", set=quick, cluster="inline")
    assert run.outcome.ok
    assert {path.name for path in bench.report().values()} >= {"report.md", "report.csv"}


def test_blocks_are_found() -> None:
    page = """- a list

    of two paragraphs

text

    bench status

<!-- run -->
```console
bench list tracks
```
"""
    assert [(b.line, b.mark, b.kind, b.text) for b in blocks("x.md", page)] == [
        (7, "", "", "bench status\n"),
        (10, "run", "console", "bench list tracks\n"),
    ]
