"""`bench doctor`: each check says how it is, on this machine and on worse ones."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from bench.cli import main
from bench.doctor import Finding, checks, examine, packages

Told = Callable[..., dict[str, list[Finding]]]


@pytest.fixture
def told(in_tmp: Path) -> Told:
    """Findings by what was looked at."""

    def ask(**where: str | Path | None) -> dict[str, list[Finding]]:
        found: dict[str, list[Finding]] = {}
        for finding in examine(**where):
            found.setdefault(finding.what, []).append(finding)
        return found

    return ask


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages and GPUs, which take seconds."""
    monkeypatch.setattr(packages, "installed", lambda: iter(()))


def test_this_machine(in_tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A line for each, and the same for machines; nothing is left behind."""
    assert main(["doctor"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "note") for line in lines), lines
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert len(found) == len(lines)
    assert {one["what"] for one in found} >= {
        "ciss-bench", "machine", "locks", "results", "names", "data voc", "weights", "scheduler", "packages",
    }  # fmt: skip
    packages = next(one for one in found if one["what"] == "packages")
    assert packages["state"] == "ok"
    assert "torch 2." in packages["says"]
    assert all(one["cure"] for one in found if one["state"] != "ok")
    assert list(in_tmp.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_results_folder_that_is_a_file(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "results").write_text("")
    assert main(["doctor"]) == 1
    assert (
        "fail  results        results is a file; name a folder with --results DIR" in capsys.readouterr().out
    )


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.usefixtures("quick")
def test_little_room(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    found = told()
    assert found["/dev/shm"][0].state == found["results"][0].state == "note"
    assert "--shm-size" in found["/dev/shm"][0].cure
    assert "0.1 GiB free" in found["results"][0].says


@pytest.mark.usefixtures("quick")
def test_a_file_system_without_locks(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told()["locks"][0].state == "ok"
    monkeypatch.setattr(checks.locks, "hold", lambda lock: contextlib.nullcontext())
    assert told()["locks"][0].state == "note"


@pytest.mark.usefixtures("quick")
def test_data(told: Told, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found with its counts; with a list but without its images; not there at all."""
    root = in_tmp / "CamVid"
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        for folder, mode, suffix in (("images", "RGB", "jpg"), ("annotations", "L", "png")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.new(mode, (4, 4)).save(root / folder / f"{name}.{suffix}")
        with (root / f"{split}.txt").open("a") as lines:
            lines.write(f"{name}\n")
    found = told(data_root=root)
    assert found["data camvid"] == [Finding("data camvid", "ok", f"{root}: 2 training and 1 test images")]
    assert "data voc" not in found
    (root / "annotations/c.png").unlink()
    lacking = told(data_root=root)["data camvid"][0]
    assert lacking.state == "fail"
    assert "annotations/c.png is not there" in lacking.says
    (in_tmp / "empty").mkdir()
    assert main(["doctor", "--data-root", "empty"]) == 1
    assert "--data-root empty: none of the data sets is there" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_weights(told: Told, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(in_tmp / "torch"))

    def states() -> dict[str, str]:
        return {finding.says.split()[0]: finding.state for finding in told()["weights"]}

    assert set(states().values()) == {"note"}
    for path in ("pretrained/resnet101_iabn_sync.pth.tar", "torch/hub/checkpoints/resnet101-63fe2227.pth"):
        (in_tmp / path).parent.mkdir(parents=True)
        (in_tmp / path).write_bytes(b"")
    found = states()
    assert found.pop("resnet101_iabn_sync.pth.tar") == found.pop("imagenet") == "ok"
    assert set(found.values()) == {"note"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        ("echo '7|RUNNING|None'", "ok", "SLURM answers; 1 jobs of yours in its queue"),
        ("echo no controller >&2; exit 1", "note", "does not answer: squeue: no controller"),
        (None, "ok", "no SLURM on this machine"),
    ],
)
def test_the_scheduler(
    told: Told, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, state: str, says: str
) -> None:
    tools = in_tmp / "tools"
    tools.mkdir()
    for name in ("sbatch", "squeue") if answer else ():
        (tools / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/nowhere")
    (tools / "sh").symlink_to(str(shutil.which("sh", path="/bin:/usr/bin")))
    found = told()["scheduler"][0]
    assert (found.state, says in found.says) == (state, True), found


CARD = """
class Properties: name, total_memory = "Old Card", 2**33
class cuda:
    is_available = staticmethod(lambda: {cards} > 0)
    init = staticmethod(lambda: (_ for _ in ()).throw(RuntimeError("driver too old\\nfor this torch")))
    device_count = staticmethod(lambda: {cards})
    get_device_properties = staticmethod(lambda index: Properties)
class version: cuda, hip = {cuda}, None
def ones(*size, device): raise RuntimeError("no kernel image is available for execution on the device")
"""


@pytest.mark.parametrize(
    ("torch", "what", "state", "says"),
    [
        (CARD.format(cards=0, cuda="'12.4'"), "GPU", "note", "none that torch can use: driver too old"),
        (CARD.format(cards=0, cuda=None), "GPU", "note", "built without CUDA"),
        (
            CARD.format(cards=1, cuda="'12.4'"),
            "GPU 0",
            "fail",
            "Old Card, 8.0 GiB, CUDA 12.4: no kernel image",
        ),
        ("raise ImportError('libcudart.so: no such file')", "packages", "fail", "torch cannot be imported"),
        ("import os; os._exit(3)", "packages", "fail", "importing them ended the process"),
    ],
)
def test_a_torch_that_does_not_fit(
    told: Told, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, torch: str, what: str, state: str, says: str
) -> None:
    """Another torch in its place, in the process that is asked."""
    place = in_tmp / "site"
    place.mkdir()
    (place / "torch.py").write_text(torch)
    for other in ("torchvision", "inplace_abn", "safetensors", "pandas", "scipy", "submitit"):
        (place / f"{other}.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(place))
    found = told()[what][0]
    assert (found.state, says in found.says) == (state, True), found
