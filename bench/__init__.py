"""ciss-bench: the benchmark harness of class-incremental semantic segmentation.

import bench
bench.run(protocol="voc-15-1", methods=["mib", "plop", "ssul"])
bench.report()
"""

from __future__ import annotations

import sys
from types import ModuleType

from bench.api import report, run

__version__ = "0.1.0"
__all__ = ["report", "run"]


class _Face(ModuleType):
    """`bench.report` stays the function when the room of that name is imported beneath it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
