"""The examples of docs/ work as they stand, from outside packages and files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import cli
from bench.data.dataset import load_dataset
from bench.protocol.file import load

ROOT = Path(__file__).resolve().parents[2]
Toy = Callable[..., Path]


def example(page: str, name: str) -> str:
    """The code block that a page marks as the content of a file."""
    text = (ROOT / "docs" / page).read_text()
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found, f"{page} has no example {name}"
    return found.group(1)


def test_the_example_method_is_short() -> None:
    assert len(example("add-a-method.md", "logit_matching.py").splitlines()) <= 60


def test_an_outside_package_adds_the_example_method_by_entry_point(
    toy: Toy, in_tmp: Path, quick: list[str]
) -> None:
    """Installed by pip into a folder of its own; found, listed, planned and trained."""
    package = in_tmp / "package"
    (package / "my_package").mkdir(parents=True)
    (package / "my_package/__init__.py").write_text("")
    for name in ("logit_matching.py", "logit_matching.toml"):
        (package / "my_package" / name).write_text(example("add-a-method.md", name))
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "my-package"\nversion = "0"\n'
        '[project.entry-points."bench.methods"]\nlogit-matching = "my_package.logit_matching"\n'
        '[tool.setuptools]\npackages = ["my_package"]\n'
        '[tool.setuptools.package-data]\nmy_package = ["*.toml"]\n'
    )
    site = in_tmp / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "--target", str(site), str(package)], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}

    def bench(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bench", *words],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )

    assert "Logit matching" in bench("list", "methods").stdout
    shown = bench("show", "method", "logit-matching", "--protocol", "ade-100-5").stdout
    assert re.search(r"weight +0\.1 +logit_matching\.toml \[method\], data set ade", shown)
    assert re.search(r"epochs +60 +mib\.toml \[published\], data set ade", shown)
    sets = [word for item in quick for word in ("--set", item)]
    done = bench(
        "run", "--protocol", str(toy(then=2)), "--methods", "ft,logit-matching", "--cluster", "local", *sets
    )
    assert done.returncode == 0, done.stderr
    assert "Logit matching" in done.stdout
    logs = [path.read_text() for path in (in_tmp / "results/jobs").glob("*/train.jsonl")]
    assert sum('"match"' in log for log in logs) == 1


def test_the_example_protocol(in_tmp: Path) -> None:
    Path("voc-12-4.toml").write_text(example("add-a-protocol.md", "voc-12-4.toml"))
    assert [len(group) for group in load("voc-12-4.toml").groups] == [12, 4, 4]


def test_the_example_data_set(in_tmp: Path) -> None:
    Path("boxes.toml").write_text(example("add-a-data-set.md", "boxes.toml"))
    dataset = load_dataset("boxes.toml")
    assert dataset.classes[1:] == ("red", "green", "blue")
    assert dataset.maps["saliency"].train


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "page", ["README.md", "docs/add-a-method.md", "docs/add-a-protocol.md", "docs/footguns.md"]
)
def test_every_option_that_a_page_names_exists(page: str) -> None:
    known = set(re.findall(r"--[a-z-]+", cli.help_text()))
    for parser in map(cli.parser, cli.COMMANDS):
        known |= set(re.findall(r"--[a-z-]+", parser.format_help()))
        for deeper in parser._subparsers._group_actions if parser._subparsers else []:
            for sub in deeper.choices.values():  # type: ignore[union-attr]
                known |= set(re.findall(r"--[a-z-]+", sub.format_help()))
    text = (ROOT / page).read_text()
    lines = [line for line in text.splitlines() if "bench " in line and "pip" not in line]
    named = {option for line in lines for option in re.findall(r"(?<!\S)--[a-z-]+", line)}
    assert named <= known, named - known
