from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import cli
from bench.commands.list import KINDS

Toy = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> tuple[int, str, str]:
    """A command in a process of its own: exit status, output, errors."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


HEAVY = (
    "import sys; from bench.cli import main; status = main({0!r}); "
    "bad = [m for m in ('torch', 'torchvision') if m in sys.modules]; sys.exit(repr(bad) if bad else status)"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        *([name, "--help"] for name in cli.COMMANDS if name != "run"),
        *(["list", kind] for kind in KINDS),
        ["show", "protocol", "voc-15-1"],
        ["show", "method", "mib"],
        [
            "plan",
            "--protocol",
            "PROTOCOL",
            "--methods",
            "joint,ft,lwf,mib,plop,ssul,ewc",
            "--set",
            "batch_size=4",
        ],
        ["status"],
    ],
)
def test_torch_is_not_imported(toy: Toy, arguments: list[str]) -> None:
    protocol = str(toy())
    code = HEAVY.format([protocol if a == "PROTOCOL" else a for a in arguments])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_driver_does_not_import_torch(toy: Toy, quick: list[str]) -> None:
    sets = [word for item in quick for word in ("--set", item)]
    code = HEAVY.format(["run", "--protocol", str(toy(then=2)), "--methods", "ft,ewc", "--smoke", *sets])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_no_command(tmp_path: Path) -> None:
    code = (
        "import sys; from bench.cli import main; main(['--help']); "
        "sys.exit(repr([m for m in sys.modules if m.startswith('bench.commands') or m == 'pydantic']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.strip() == "[]"
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)


def test_a_broken_plug_in_is_a_warning_in_lists_and_an_error_only_for_who_asks(in_tmp: Path) -> None:
    about = in_tmp / "site" / "broken-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[bench.methods]\nbroken = broken_method\n[bench.profiles]\nours = nowhere:profile\n"
    )
    (in_tmp / "site" / "broken_method.py").write_text("raise RuntimeError('of theirs')\n")
    path = os.pathsep.join([str(ROOT), str(in_tmp / "site")])

    def bench(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-m", "bench", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    for kind, name in (("methods", "broken"), ("profiles", "ours")):
        listed = bench("list", kind)
        assert listed.returncode == 0
        assert "\n" in listed.stdout
        assert listed.stderr.startswith(f"WARNING: {kind[:-1]} {name!r} (entry point of bench.{kind}: ")
        assert listed.stderr.count("\n") == 1
    assert bench("show", "method", "mib").returncode == 0
    asked = bench("show", "method", "broken")
    assert asked.returncode == 2
    assert "cannot be loaded: RuntimeError: of theirs" in asked.stderr


def test_names_take_wildcards(in_tmp: Path) -> None:
    status, out, _ = run("plan", "--protocol", "shapes-*", "--methods", "ft", "--json")
    assert status == 0
    found = {chain["protocol"] for chain in json.loads(out)["chains"]}
    assert len(found) > 1
    assert all(name.startswith("shapes-") for name in found)
    status, _, error = run("plan", "--protocol", "shaps-*", "--methods", "ft")
    assert status == 2
    assert "--protocol: unknown protocol 'shaps-*'" in error


def test_report_does_not_import_torch(toy: Toy, quick: list[str], in_tmp: Path) -> None:
    sets = [word for item in quick for word in ("--set", item)]
    status, _, error = run("run", "--protocol", str(toy(then=2)), "--methods", "ft", "--smoke", *sets)
    assert status == 0, error
    done = subprocess.run(
        [sys.executable, "-c", HEAVY.format(["report", "--smoke"])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.parent.as_posix() for path in Path("reports").rglob("*.*")} == {"reports/smoke"}


@pytest.mark.parametrize("command", ["run", "plan", "list", "show", "status", "report", "new-method"])
def test_every_help_ends_with_two_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out.rstrip()
    examples = text.partition("examples:\n")[2].splitlines()
    assert len(examples) == 2
    assert all(line.strip().startswith(f"bench {command}") for line in examples)


def test_a_user_error_is_one_line_and_status_2(in_tmp: Path) -> None:
    for arguments, words in (
        (["run", "--protocol", "voc-15-11", "--methods", "ft"], "did you mean 'voc-15-1'"),
        (["run", "--protocol", "shapes-6-2", "--methods", "mibb"], "did you mean 'mib'"),
        (
            ["run", "--protocol", "voc-15-1", "--methods", "ft", "--data-root", "/nowhere"],
            "--data-root /nowhere: no such folder",
        ),
        (["run", "--protocol", "shapes-6-2", "--methods", "ft", "--track", "tiny"], "unknown track 'tiny'"),
        (
            ["plan", "--protocol", "shapes-6-2", "--methods", "ft", "--seeds", "a"],
            "--seeds a: write whole numbers",
        ),
        (["show", "method", "plob"], "did you mean 'plop'"),
        (["run", "--protocol", ",", "--methods", "ft"], "--protocol: empty"),
        (
            ["run", "--protocol", "shapes-6-2", "--methods", "ft", "--json"],
            "--json: prints the plan of --dry-run",
        ),
        (["list", "protcols"], "did you mean 'protocols'"),
        (["frob"], "unknown word 'frob'"),
        (["show", "protocol", "voc-15-1", "--indices"], "--indices: needs the data"),
        (["status", "--results", __file__], "a file, not a folder"),
        (["run", "--protocol", "shapes-6-2"], "required: --methods"),
        (
            ["run", "--protocol", "shapes-6-2", "--methods", "ft", "--jobs", "0"],
            "'0' is not a whole number of at least 1",
        ),
    ):
        status, out, error = run(*arguments)
        assert status == 2, arguments
        assert words in error
        assert error.count("\n") == 1
        assert out == ""


def test_plan_as_text_and_as_json(toy: Toy, in_tmp: Path) -> None:
    protocol = str(toy())
    status, out, _ = run("plan", "--protocol", protocol, "--methods", "ft,mib", "--set", "batch_size=4")
    assert status == 0
    assert "shared by ft[batch_size=4], mib[batch_size=4]" in out
    assert "5 jobs for 6 steps of 2 chains; 0 done, 5 to train" in out
    status, out, _ = run(
        "run", "--dry-run", "--json", "--protocol", protocol, "--methods", "ft,mib", "--set", "batch_size=4"
    )
    data = json.loads(out)
    assert len(data["jobs"]) == 5
    assert {job["state"] for job in data["jobs"]} == {"waiting"}
    assert not (in_tmp / "results").exists()


def test_show_protocol(in_tmp: Path, shared: Path) -> None:
    status, out, _ = run(
        "show", "protocol", "voc-15-1", "--class-index", str(shared / "data/voc/train_classes.txt")
    )
    assert status == 0
    assert "16 pottedplant" in out
    counts = [line.split()[2] for line in out.splitlines() if line.strip() and line.split()[0] in "012345"]
    assert counts == ["9568", "487", "299", "491", "500", "548"]
    status, out, _ = run(
        "show",
        "protocol",
        "voc-15-1",
        "--json",
        "--indices",
        "--class-index",
        str(shared / "data/voc/train_classes.txt"),
    )
    assert json.loads(out)["steps"][5]["train_indices"][:1]


def test_show_method_prints_each_value_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "method", "plop", "--protocol", "voc-15-1", "--set", "epochs=3"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "plop.toml [published]" in lines["label_rule"]
    assert "--set" in lines["epochs"]
    assert "default" in lines["scales"]


def test_python_bench_py_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench.py"), "list", "tracks"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "controlled" in done.stdout
