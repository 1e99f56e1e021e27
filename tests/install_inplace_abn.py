"""Build and install the package inplace-abn for the processor alone: `python tests/install_inplace_abn.py`.

The package is source only, imports torch while it is built, and asks for a CUDA compiler whenever torch
itself was built with CUDA. On a machine without a GPU this builds its C++ part only, which is all that the
tests compare with. With a GPU and a CUDA toolkit, `pip install --no-build-isolation inplace-abn` is the way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "1.1.0"
BUILD = """
import runpy, sys, torch
torch.has_cuda = False
sys.argv = ["setup.py", "-q", "bdist_wheel", "-d", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


def main() -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quiet = {
            **os.environ,
            "CUDA_HOME": os.environ.get("CUDA_HOME", name),
        }  # read when the metadata is made, used for nothing
        fetch = [
            "download",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "--no-cache-dir",
            "-d",
            name,
        ]
        subprocess.run(
            [*pip, *fetch, f"inplace-abn=={VERSION}"], check=True, env=quiet, stdout=subprocess.DEVNULL
        )
        with tarfile.open(next(folder.glob("inplace*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source = next(path for path in folder.iterdir() if path.is_dir() and path.name.startswith("inplace"))
        subprocess.run(
            [sys.executable, "-c", BUILD, name],
            check=True,
            cwd=source,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        subprocess.run(
            [*pip, "install", "--no-deps", "--force-reinstall", str(next(folder.glob("*.whl")))], check=True
        )
    print(f"inplace-abn {VERSION} installed")


if __name__ == "__main__":
    main()
