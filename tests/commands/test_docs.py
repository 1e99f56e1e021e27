"""The examples of docs/ work as they stand, from outside packages and files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest
from follow import script
from safetensors.torch import load_file

from bench import cli
from bench.data.dataset import load_dataset
from bench.method import skeleton
from bench.method.registry import METHODS
from bench.method.settings import Settings
from bench.protocol.file import load

ROOT = Path(__file__).resolve().parents[2]


def example(page: str, name: str) -> str:
    """The code block that a page marks as the content of a file."""
    text = (ROOT / "docs" / page).read_text()
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found, f"{page} has no example {name}"
    return found.group(1)


def test_the_example_method_is_short() -> None:
    assert len(example("add-a-method.md", "methods/logit_matching.py").splitlines()) <= 60


@pytest.fixture
def readers_checkout(tmp_path: Path) -> Path:
    """A checkout with the environment of the README's first line: an editable installation.

    Packages come from the environment of the tests instead of the network; what the page installs is found
    there.
    """
    checkout = tmp_path / "ciss-bench"
    checkout.mkdir()
    for name in ("bench", "methods", "protocols", "slurm", "reports"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "bench.py"):
        shutil.copy(ROOT / name, checkout)
    environment = checkout / ".venv"
    venv.create(environment, symlinks=True)
    found = [path for path in sys.path if path.endswith("-packages")]
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "editable.pth").write_text("\n".join([str(checkout), *found]))
    for tool in ("pip", "pytest", "bench"):
        program = environment / "bin" / tool
        program.write_text(f'#!/bin/sh\nexec "{environment}/bin/python" -m {tool} "$@"\n')
        program.chmod(0o755)
    return checkout


def followed(page: str, checkout: Path) -> dict[str, str]:
    """What each command of a page prints when a reader follows it in a checkout."""
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        ["bash", "-c", script((ROOT / page).read_text())],
        cwd=checkout,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(*[iter(re.split(r"^\$ (.*)\n", done.stdout, flags=re.M)[1:])] * 2, strict=True))


def test_the_page_on_methods_word_for_word(readers_checkout: Path) -> None:
    """In the environment of the README's first line: the skeleton, the example in its place, its test, a run,
    and a package of one's own installed by pip."""
    said = followed("docs/add-a-method.md", readers_checkout)
    assert "methods/logit_matching.py" in said["bench new-method logit-matching"]
    assert "1 passed" in said["pytest tests/test_logit_matching.py"]
    shown = said["bench show method logit-matching --protocol ade-100-5"]
    assert re.search(r"weight +0\.1 +logit_matching\.toml \[method\], data set ade", shown)
    assert re.search(r"epochs +60 +mib\.toml \[published\], data set ade", shown)
    run = next(out for command, out in said.items() if command.startswith("bench run"))
    assert "Logit matching" in run
    logs = [path.read_text() for path in (readers_checkout / "results/smoke/jobs").glob("*/train.jsonl")]
    assert sum('"match"' in log for log in logs) == 2
    assert "deep-thought" in said["bench list methods"]
    package = readers_checkout.parent / "deep-thought"
    for file in ("pyproject.toml", "deep_thought/deep_thought.toml", "tests/test_deep_thought.py"):
        assert (package / file).is_file(), file


def test_the_page_on_a_network_word_for_word(readers_checkout: Path) -> None:
    """A network whose output is no logits, through all three steps: it grows, and has a teacher from step 1
    on."""
    said = followed("docs/how-to/network-of-your-own.md", readers_checkout)
    assert "small-queries" in said["bench list networks"]
    assert re.search(
        r"network +small-queries +queries\.toml", said["bench show method queries --protocol shapes-6-2"]
    )
    run = next(out for command, out in said.items() if command.startswith("bench run"))
    assert "Queries" in run
    chain = readers_checkout / "results/smoke/shapes-6-2/small/queries/seed-0"
    for step, sizes in enumerate(([7], [7, 2], [7, 2, 2])):
        weights = load_file(chain / f"step-{step}/model.safetensors")
        assert [len(weights[f"scores.{k}.bias"]) for k in range(len(sizes))] == sizes
        assert f"scores.{len(sizes)}.bias" not in weights
        assert ('"kd"' in (chain / f"step-{step}/train.jsonl").read_text()) == (step > 0)


def test_what_only_that_network_carries_is_refused(readers_checkout: Path) -> None:
    page = ROOT / "docs/how-to/network-of-your-own.md"
    for name in re.findall(r"<!-- example: (\S+) -->", page.read_text()):
        (readers_checkout / name).parent.mkdir(exist_ok=True)
        (readers_checkout / name).write_text(example("how-to/network-of-your-own.md", name))
    bench = readers_checkout / ".venv/bin/bench"
    for words, why in (
        ("queries --set network=small", "network = 'small': does not carry the classifier 'queries'"),
        ("mib --set network=small-queries", "'small-queries': does not carry the classifier 'linear'"),
        ("queries --track published", "no published recipe for data set 'shapes'"),
    ):
        done = subprocess.run(
            [bench, "plan", "--protocol", "shapes-6-2", "--methods", *words.split()],
            cwd=readers_checkout,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert why in done.stderr


def test_the_package_of_a_new_method_packs_its_recipe(tmp_path: Path) -> None:
    """Its wheel, not an editable installation, which would find the recipe where it was written."""
    skeleton.write("deep-thought", str(tmp_path / "deep_thought"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    site = tmp_path / "site"
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(site), str(tmp_path)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "bench", "show", "method", "deep-thought", "--protocol", "shapes-6-2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"weight +1\.0 +deep_thought\.toml \[method\]", done.stdout)


def test_the_example_protocol(in_tmp: Path) -> None:
    Path("voc-12-4.toml").write_text(example("add-a-protocol.md", "voc-12-4.toml"))
    assert [len(group) for group in load("voc-12-4.toml").groups] == [12, 4, 4]


def test_the_example_data_set(in_tmp: Path) -> None:
    Path("boxes.toml").write_text(example("add-a-data-set.md", "boxes.toml"))
    dataset = load_dataset("boxes.toml")
    assert dataset.classes[1:] == ("red", "green", "blue")
    assert dataset.maps["saliency"].train


def reference() -> ModuleType:
    """The hook of mkdocs.yml, which makes pages from the code."""
    path = ROOT / "docs/reference.py"
    spec = importlib.util.spec_from_file_location("reference_pages", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_pages_lead_somewhere() -> None:
    made = {ROOT / "docs" / path for path in reference().PAGES}
    pages = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/*.md", "docs/[!s]*/*.md")
    for page in [page for pattern in pages for page in ROOT.glob(pattern)]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            there = page.parent / target
            assert there.exists() or there.resolve() in made, f"{page.name}: {target}"


def test_the_page_of_methods_has_them_all() -> None:
    page = reference().methods_page()
    for name in METHODS.known():
        cls = METHODS.find(name).cls
        section = page.partition(f"{{ #{name} }}\n")[2].partition("\n## ")[0]
        assert " ".join((cls.__doc__ or "").split()) in section, name
        for key in cls.Config.model_fields.keys() - Settings.model_fields.keys():
            assert f"| `{key}` |" in section, f"{name}: {key}"
        for caveat in cls.caveats:
            assert caveat in section


def test_recorded_cases_are_counted_by_family() -> None:
    page = reference()
    assert page.golden_cases("dkd") == {"eir": 45, "chain-dkd": 2}
    assert page.golden_cases("ewc") == {"mib": 99, "chain-mib": 8}
    assert page.golden_cases("dft") == {"dft": 3}
    assert page.golden_cases("joint") == {}


def test_the_page_of_commands_has_every_option_and_example() -> None:
    page = reference().commands_page()
    for command in cli.COMMANDS:
        section = page.partition(f"## bench {command}\n")[2].partition("\n## ")[0]
        text = cli.parser(command).format_help()
        for option in re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE):
            assert option == "--help" or f"| `{option}" in section, f"{command} {option}"
        for example in text.rpartition("examples:\n")[2].splitlines():
            assert example.strip() in section
    for words in ("### bench show protocol", "### bench show method", "`--class-index FILE`", "`--indices`"):
        assert words in page


def test_the_page_of_settings_has_them_all() -> None:
    page = reference().settings_page()
    for name, info in Settings.model_fields.items():
        assert f"| `{name}` | `{'none' if info.default is None else json.dumps(info.default)}` |" in page


PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("[!s]*/*.md")]


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in PAGES])
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
