"""ciss-bench: the benchmark harness of class-incremental semantic segmentation.

import bench
bench.run(protocol="voc-15-1", methods=["mib", "plop", "ssul"])
bench.report()
"""

from __future__ import annotations

from bench.api import report, run

__version__ = "0.1.0"
__all__ = ["report", "run"]
