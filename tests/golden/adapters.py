"""ADAPTERS for the golden vectors: "family/function" -> a few lines that call the project's real code.

Each module beside this one holds the adapters of the family that its name begins with (mib.py, mib_data.py),
and chain_mib.py those of the family chain-mib. They find common.py and each other under the names
golden_common, golden_chain, ...
"""

import importlib.util
import pathlib
import sys

SHARED = ("common", "steps", "chain", "chain_deeplab")
"""What several families use; it comes first."""
HERE = pathlib.Path(__file__).resolve().parent


def _load(stem):
    """A module of this folder, in whatever way this one was loaded."""
    spec = importlib.util.spec_from_file_location(f"golden_{stem}", HERE / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


for _stem in SHARED:
    _load(_stem)
ADAPTERS = {}
# A family's own module comes after those of its parts, which it may use.
for _stem in sorted((path.stem for path in HERE.glob("*.py")), key=lambda stem: ("_" not in stem, stem)):
    if _stem in SHARED or _stem in ("adapters", "test_golden"):
        continue
    _parts = _stem.split("_")
    _family = "-".join(_parts[:2]) if _parts[0] == "chain" else _parts[0]
    ADAPTERS |= {f"{_family}/{name}": adapter for name, adapter in _load(_stem).ADAPTERS.items()}
