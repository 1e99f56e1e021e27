"""ADAPTERS for the golden vectors: "family/function" -> a few lines that call the project's real code.

Each module beside this one holds the adapters of the family that its name begins with.
"""

import importlib.util
import pathlib
import sys

ADAPTERS = {}
for _path in sorted(pathlib.Path(__file__).resolve().parent.glob("*.py")):
    _family = _path.stem.partition("_")[0]
    if _family not in ("mib", "plop", "nest", "ssul", "mbs", "eir"):
        continue
    _spec = importlib.util.spec_from_file_location(f"golden_{_path.stem}", _path)
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = _module
    _spec.loader.exec_module(_module)
    ADAPTERS.update({f"{_family}/{name}": function for name, function in _module.ADAPTERS.items()})
