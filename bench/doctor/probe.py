"""What the packages and the GPUs say, asked in a process of its own: a broken installation can end it without
a word.

    python -m bench.doctor.probe

prints one JSON object: "packages" (version, or "" and why under "broken"), "cuda" (the CUDA of the torch
build, or null), "devices" (name, bytes, and the error of a small product on it) and "why" there is none.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from typing import Any

MODULES = {
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "pillow": "PIL", "scipy": "scipy",
    "pandas": "pandas", "submitit": "submitit", "safetensors": "safetensors", "inplace-abn": "inplace_abn",
}  # fmt: skip
"""Packages that runs use, and what they are imported as."""


def packages() -> tuple[dict[str, str], dict[str, str]]:
    """(version by package, "" if it is not there; error by package that is there and cannot be imported)."""
    versions, broken = {}, {}
    for name, module in MODULES.items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever an installation that does not fit raises
            broken[name] = f"{type(error).__name__}: {error}"
    return versions, broken


def gpus() -> dict[str, Any]:
    """What torch says of the GPUs of this machine."""
    import torch

    found: dict[str, Any] = {"cuda": torch.version.cuda or torch.version.hip, "devices": [], "why": ""}
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as error:  # torch's own reason
            found["why"] = str(error).strip().splitlines()[0]
        return found
    for index in range(torch.cuda.device_count()):
        about, wrong = torch.cuda.get_device_properties(index), ""
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            if float((ones @ ones).sum()) != 64.0**3:
                wrong = "a product of matrices came out wrong"
        except Exception as failure:  # no kernel for this card, no memory left, …
            wrong = str(failure).strip().splitlines()[0]
        found["devices"].append({"name": about.name, "bytes": about.total_memory, "error": wrong})
    return found


def main() -> None:
    """Print what there is."""
    versions, broken = packages()
    print(json.dumps({"packages": versions, "broken": broken, **({} if "torch" in broken else gpus())}))


if __name__ == "__main__":
    main()
