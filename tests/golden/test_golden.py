"""The project's functions against vectors recorded from the authors' own code (tests/golden/data)."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

HERE = pathlib.Path(__file__).resolve().parent
RTOL, ATOL = 1e-4, 1e-6


def _adapters() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("golden_adapters", HERE / "adapters.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_adapters"] = module
    spec.loader.exec_module(module)
    return module.ADAPTERS


ADAPTERS = _adapters()
CASES = [
    (manifest.parent, case)
    for manifest in sorted((HERE / "data").glob("*/manifest.json"))
    for case in json.loads(manifest.read_text())
]


def differs(got: Any, want: np.ndarray, rtol: float, atol: float) -> str:
    """What differs between two arrays, or ""."""
    got = np.asarray(got)
    if got.shape != want.shape and got.size == want.size == 1:
        got = got.reshape(want.shape)
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    if want.dtype.kind in "iubUS":
        return "" if (got == want).all() else f"{np.count_nonzero(got != want)} of {want.size} entries differ"
    close = np.allclose(got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True)
    return "" if close else f"max abs difference {np.nanmax(np.abs(got.astype(np.float64) - want)):.3g}"


def test_there_are_all_open_cases() -> None:
    """Cases and functions of each family. One of two chains of DKD is not among them, to keep the repository
    small."""
    cases = Counter(folder.name for folder, _ in CASES)
    functions = Counter(family for family, _ in {(folder.name, case["function"]) for folder, case in CASES})
    assert {family: (n, functions[family]) for family, n in cases.items()} == {
        "awt": (9, 3),
        "barm": (15, 5),
        "dft": (3, 1),
        "reminder": (6, 2),
        "ucd": (6, 2),
        "star": (30, 10),
        "chain-dkd": (2, 2),
        "chain-mbs": (1, 1),
        "chain-mib": (8, 8),
        "chain-nest": (2, 2),
        "chain-plop": (1, 1),
        "chain-ssul": (3, 3),
        "eir": (45, 15),
        "ewf": (9, 3),
        "mbs": (42, 14),
        "mib": (99, 33),
        "nest": (18, 6),
        "plop": (42, 14),
        "ssul": (33, 11),
    }


@pytest.mark.parametrize(
    ("folder", "case"), CASES, ids=[f"{f.name}/{c['function']}/{c['case']}" for f, c in CASES]
)
def test_case(folder: pathlib.Path, case: dict[str, Any]) -> None:
    with np.load(folder / case["file"], allow_pickle=False) as z:
        arrays = {name: z[name] for name in z.files}
    inputs = {name: arrays[name] for name in case["inputs"] if name in arrays}
    out = ADAPTERS[f"{folder.name}/{case['function']}"](inputs, dict(case["params"]))
    tolerance = case.get("tolerance") or {}
    wanted = [name for name in case["outputs"] if name in arrays]
    wrong = {
        name: differs(out[name], arrays[name], tolerance.get("rtol", RTOL), tolerance.get("atol", ATOL))
        if name in out
        else "not returned"
        for name in wanted
    }
    assert {name: why for name, why in wrong.items() if why} == {}
