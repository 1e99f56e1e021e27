from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.method import skeleton

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a developer of methods works in."""
    for name in ("bench", "methods", "protocols", "slurm", "reports"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(
        [sys.executable, *words], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


def test_a_new_method_fails_its_test_until_it_is_filled(checkout: Path) -> None:
    done = run(checkout, "-m", "bench", "new-method", "my-method")
    assert done.returncode == 0, done.stderr
    written = [Path(line) for line in done.stdout.split()]
    assert [path.relative_to(checkout).as_posix() for path in written] == [
        "methods/my_method.py",
        "methods/my_method.toml",
        "tests/test_my_method.py",
    ]
    assert "my-method" in run(checkout, "-m", "bench", "list", "methods").stdout
    test = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_my_method.py"]
    failed = run(checkout, *test)
    assert failed.returncode == 1
    assert "my-method: write the loss" in failed.stdout
    code = written[0].read_text()
    loss = "return F.mse_loss(logits[:, : logits_old.shape[1]], logits_old)"
    filled = code.replace('raise NotImplementedError("my-method: write the loss")', loss)
    written[0].write_text(filled)
    passed = run(checkout, *test)
    assert passed.returncode == 0, passed.stdout


def test_a_package_that_is_there_stays_and_its_lines_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.cli import main

    (tmp_path / "pyproject.toml").write_text("# mine\n")
    assert main(["new-method", "deep-thought", "--folder", str(tmp_path / "my_package")]) == 0
    out = capsys.readouterr().out
    assert '[project.entry-points."bench.methods"]\ndeep-thought = "my_package.deep_thought"' in out
    assert (tmp_path / "pyproject.toml").read_text() == "# mine\n"
    compile((tmp_path / "my_package/deep_thought.py").read_text(), "deep_thought.py", "exec")


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="letters, digits and underscores"):
        skeleton.write("mine", str(tmp_path / "my-package"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Mib", "lower-case letters"),
        ("mib", "there is a method of this name"),
        ("9lives", "begins with a letter"),
    ],
)
def test_a_name_that_cannot_be_one(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        skeleton.write(name, str(tmp_path))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    skeleton.write("mine", str(tmp_path / "a"))
    with pytest.raises(UserError, match="exists already"):
        skeleton.write("mine", str(tmp_path / "a"))
