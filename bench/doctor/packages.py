"""The packages that runs use, and the GPUs that torch finds. Nothing here imports any of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from bench import __version__, shipped
from bench.doctor.finding import Finding, State, gib
from bench.provenance import commit

PROBE_SECONDS = 300.0
"""How long importing torch may take on a cold network file system."""


def python(arguments: list[str], seconds: float = PROBE_SECONDS) -> subprocess.CompletedProcess[str]:
    """A process of its own, with this package."""
    home = str(shipped.PACKAGE.parent)
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=seconds,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def installed() -> Iterator[Finding]:
    """This package, the others, and GPUs, asked in a process of its own."""
    yield _version()
    try:
        done = python(["-m", "bench.doctor.probe"])
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        cure = "the file system of the environment is slow, or a driver hangs"
        yield Finding("packages", "fail", f"importing them took more than {PROBE_SECONDS:.0f} s", cure)
        return
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
        yield Finding("packages", "fail", f"importing them ended the process: {last}", "install torch again")
        return
    yield _packages(told["packages"], told["broken"])
    if "devices" in told:
        yield from _gpus(told)


def _version() -> Finding:
    at = f", commit {commit()}" if commit() else ""
    words = f"{__version__}{at}; Python {platform.python_version()}; {platform.platform(terse=True)}"
    return Finding("ciss-bench", "ok", words)


def _packages(versions: dict[str, str], broken: dict[str, str]) -> Finding:
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    optional = {"inplace-abn"}
    lacking = [name for name, version in versions.items() if not version and name not in optional]
    wrong = [f"{name} is not installed" for name in lacking]
    wrong += [f"{name} cannot be imported ({why})" for name, why in broken.items()]
    if not wrong:
        return Finding("packages", "ok", there)
    state: State = "fail" if lacking or set(broken) - optional else "note"
    cure = "install matching versions: pip install -c constraints.txt -e ."
    return Finding("packages", state, f"{there}; {'; '.join(wrong)}", cure)


def _gpus(told: dict[str, Any]) -> Iterator[Finding]:
    for index, device in enumerate(told["devices"]):
        says = f"{device['name']}, {gib(device['bytes'])}, CUDA {told['cuda']}"
        if device["error"]:
            cure = "install a torch built for this card and driver"
            yield Finding(f"GPU {index}", "fail", f"{says}: {device['error']}", cure)
        else:
            yield Finding(f"GPU {index}", "ok", says)
    if told["devices"]:
        return
    if not told["cuda"]:
        yield Finding("GPU", "note", "this torch is built without CUDA", "jobs run on the CPU")
    else:
        why = told["why"] or "it does not say why"
        yield Finding("GPU", "note", f"none that torch can use: {why}", "jobs run on the CPU")
