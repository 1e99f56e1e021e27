"""Which code a job ran, and what is said when it is not the installed code any more."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import provenance
from bench.cli import main
from bench.store.changes import Change, change, change_lines, changes
from bench.store.records import Code, Environment, write_record
from bench.store.results import Store
from bench.testing.plugins import Offers

CODE = '"""What it is."""\n\nTEMPERATURE = 2.0\n\n\ndef f(x):\n    """Says."""\n    return x + 1  # one\n'


def digest_of(path: Path, text: str) -> str:
    path.write_text(text)
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    return provenance.digest(path)


# ---- digests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# one", "# another word", True),
        ("What it is", "What it was", True),
        ('    """Says."""\n', "", True),
        ("x + 1", "(x\n            + 1)", True),
        ("2.0", "40.0", False),
        ("x + 1", "x + 1.0", False),
        ("x + 1", "x - 1", False),
        ("def f(x)", "def f(x, y=None)", False),
        ("return x + 1", "return", False),
    ],
)
def test_a_digest_changes_with_the_code_and_not_with_the_words(
    tmp_path: Path, old: str, new: str, same: bool
) -> None:
    path = tmp_path / "code.py"
    before = digest_of(path, CODE)
    assert (digest_of(path, CODE.replace(old, new)) == before) is same


def test_a_file_that_is_no_python_has_a_digest_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    assert digest_of(path, "def f(:\n") != digest_of(path, "def g(:\n")


def test_the_files_of_a_method_are_its_own_and_those_of_methods_that_it_imports() -> None:
    assert set(provenance.files("methods.ewc")) == {"methods/ewc.py"}
    assert {"methods/nest.py", "methods/mib.py"} <= set(provenance.files("methods.nest"))
    assert provenance.files("no_such_package.mine") == {}


PACKAGE = {
    "outside/__init__.py": "",
    "outside/mine.py": "from . import parts\nimport json, numpy, beside\nfrom methods.mib import MiB\n",
    "outside/parts.py": "def f():\n    from outside.deep.down import X\n",
    "outside/deep/__init__.py": "",
    "outside/deep/down.py": "X = 1\n",
    "outside/other.py": "Y = 1\n",
    "beside.py": "Z = 1\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in PACKAGE.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    provenance._homes.cache_clear()
    return tmp_path / "src"


def test_imports_are_followed_within_a_package_and_to_what_stands_beside_it(package: Path) -> None:
    found = provenance.files("outside.mine")
    assert set(found) == {*PACKAGE, "methods/__init__.py", "methods/mib.py"} - {"outside/other.py"}
    assert set(provenance.files("outside")) >= set(PACKAGE) - {"beside.py"} | {"outside/other.py"}


def test_the_engine_is_told_by_its_parts() -> None:
    found = provenance.engine()
    assert {"bench/train", "bench/data", "bench/method", "bench/seeds.py"} <= set(found)
    assert not {"bench/commands", "bench/report", "bench/launch"} & set(found)
    assert len(set(found.values())) == len(found)


# ---- against what is installed -----------------------------------------------------------------------------


def test_what_changed_is_told_and_a_package_that_is_gone_is_not(package: Path) -> None:
    engine = provenance.engine()
    ran = Environment(code=Code(method=provenance.files("outside.mine"), engine=engine))
    assert change(ran) == Change()
    (package / "outside/parts.py").write_text("# a comment\n" + PACKAGE["outside/parts.py"])
    assert change(ran) == Change()
    (package / "outside/parts.py").write_text(PACKAGE["outside/parts.py"] + "    return X\n")
    (package / "beside.py").unlink()  # a package of one file: it is gone
    provenance._homes.cache_clear()
    assert change(ran).files == ("outside/parts.py",)
    (package / "outside/deep/down.py").unlink()
    assert change(ran).files == ("outside/deep/down.py", "outside/parts.py")
    shutil.rmtree(package / "outside")
    provenance._homes.cache_clear()
    assert change(ran) == Change()


def test_recorders_count_and_the_engine_is_told_apart() -> None:
    engine = {**provenance.engine(), "bench/train": "other", "bench/gone": "other"}
    recorders = {"fisher": {"methods/ewc.py": "other"}}
    ran = Environment(code=Code(method=provenance.files("methods.ft"), recorders=recorders, engine=engine))
    assert change(ran) == Change(("methods/ewc.py",), ("bench/train",))
    assert change(Environment()) == Change()


def test_lines_count_jobs_and_name_few_files() -> None:
    a, b = Change(("methods/mib.py",)), Change(("methods/mib.py",), ("bench/data", "bench/train"))
    assert change_lines([a, a, b, Change()]) == [
        "methods/mib.py has changed since 3 of these jobs ran: --force, or raise its version",
        "the engine is not quite what 1 of these jobs ran with: bench/data, bench/train have changed",
    ]
    assert change_lines([Change(tuple("abcde"))]) == [
        "a, b, c and 2 more have changed since 1 of these jobs ran: --force, or raise their versions"
    ]
    assert change_lines([Change()]) == change_lines([]) == []


# ---- the commit --------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, in which the package seems to stand."""
    root = tmp_path / "repository"
    (root / "bench").mkdir(parents=True)
    (root / "bench/x.py").write_text("X = 1\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    monkeypatch.setattr("bench.shipped.PACKAGE", root / "bench")
    return root


def test_the_commit_of_a_checkout_and_whether_it_was_edited(repository: Path) -> None:
    clean = provenance.commit()
    assert clean is not None
    assert len(clean) == 12
    (repository / "notes.txt").write_text("not code\n")
    assert provenance.commit() == clean
    (repository / "bench/y.py").write_text("Y = 1\n")  # a new method that git does not know
    assert provenance.commit() == f"{clean}-dirty"
    (repository / "bench/y.py").unlink()
    (repository / "bench/x.py").write_text("X = 2\n")
    assert provenance.commit() == f"{clean}-dirty"


def test_the_repository_around_an_environment_is_not_the_packages(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = repository / ".venv/lib/site-packages/bench"
    inside.mkdir(parents=True)
    monkeypatch.setattr("bench.shipped.PACKAGE", inside)
    assert provenance.commit() is None


def test_a_hook_of_another_repository_names_no_commit_of_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = provenance.commit()
    git(tmp_path, "init", "-q", "thesis")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "thesis/.git"))
    assert provenance.commit() == right


def test_no_git_no_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository / "empty"))
    assert provenance.commit() is None


# ---- commands ----------------------------------------------------------------------------------------------


WARM = """from bench.method import Method

T = 2


class Warm(Method):
    title = "Warm"
"""


def test_run_status_list_and_report_say_that_a_method_has_changed(
    toy: Callable[..., Path],
    quick: list[str],
    in_tmp: Path,
    offer: Offers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An outside method in which a temperature goes from 2 to 40."""
    file = in_tmp / "warm.py"
    file.write_text(WARM)
    monkeypatch.syspath_prepend(str(in_tmp))
    monkeypatch.delitem(sys.modules, "warm", raising=False)
    provenance._homes.cache_clear()
    offer("warm", importlib.import_module("warm").Warm)

    def bench(*words: str) -> str:
        assert main(words) == 0
        said = capsys.readouterr()
        return said.out + said.err

    sets = [word for item in (*quick, "first_epochs=1") for word in ("--set", item)]
    protocol = str(toy(images=8, then=2))
    run = ["run", "--protocol", protocol, "--methods", "warm", "--cluster", "inline", *sets]
    assert "changed" not in bench(*run)
    file.write_text(WARM.replace("T = 2", "T = 2  # kelvin"))
    quiet = bench(*run) + bench("status") + bench("list", "methods") + bench("report")
    assert "nothing to do" in quiet
    assert "changed" not in quiet
    file.write_text(WARM.replace("T = 2", "T = 40"))
    line = "warm.py has changed since 2 of these jobs ran: --force, or raise its version"
    again = bench(*run)
    assert line in again
    assert "[1] warm.py has changed since 2 of its jobs ran" in again
    status = bench("status")
    assert line in status
    assert status.count("warm.py changed since") == 2
    rows = json.loads(bench("status", "--json"))
    assert [row["changed"] for row in rows] == [["warm.py"], ["warm.py"]]
    listed = bench("list", "methods").splitlines()
    assert [row.split()[0] for row in listed if "warm.py since 2 of its jobs ran" in row] == ["warm"]
    assert line in bench("report")
    assert line in bench("report", "--protocol", "toy-2-2")
    assert "changed" not in bench(*run, "--force")
    assert "changed" not in bench("status")


def test_a_damaged_environment_says_nothing_and_stops_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key, text in (("good", None), ("empty", ""), ("cut", '{"schema": 2, "pack')):
        path = store.artifact(key) / Environment.file
        path.parent.mkdir(parents=True)
        if text is None:
            write_record(path, Environment(code=Code(engine={"bench/train": "what it was"})))
        else:
            path.write_text(text)
    found = changes(store, ["good", "empty", "cut", "gone"])
    assert found == {"good": Change(engine=("bench/train",))}
