"""ADAPTERS for the golden vectors: "family/function" -> a few lines that call the project's real code.

Each module beside this one holds the adapters of the family that its name begins with, and chain_mib.py those
of the family chain-mib. They find common.py and each other under the names golden_common, golden_chain, ...
"""

import importlib.util
import pathlib
import sys

FAMILIES = ("mib", "plop", "nest", "ssul", "mbs", "eir")
CHAINS = ("mib", "plop", "nest", "ssul", "dkd", "mbs")
HERE = pathlib.Path(__file__).resolve().parent


def _load(stem):
    """A module of this folder, in whatever way this one was loaded."""
    spec = importlib.util.spec_from_file_location(f"golden_{stem}", HERE / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


for _stem in ("common", "steps", "chain", "chain_deeplab"):
    _load(_stem)
ADAPTERS = {}
for _stem in sorted(path.stem for path in HERE.glob("*_*.py")) + list(FAMILIES):
    _family, _, _chain = _stem.partition("_")
    if _family == "chain" and _chain in CHAINS:
        _family = f"chain-{_chain}"
    elif _family not in FAMILIES:
        continue
    ADAPTERS |= {f"{_family}/{name}": adapter for name, adapter in _load(_stem).ADAPTERS.items()}
