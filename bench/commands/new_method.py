"""`bench new-method`: a skeleton to fill in."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """examples:
  bench new-method my-method
  bench new-method my-method --folder ~/my-package/my_package"""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("name")
    folder = "the package of yours that is to hold the method (default: methods/ of this checkout)"
    parser.add_argument("--folder", metavar="DIR", help=folder)


def run(args: argparse.Namespace) -> int:
    """Write the files, and print their paths."""
    from bench.method import skeleton

    written = skeleton.write(args.name, args.folder)
    for path in written:
        print(path)
    if args.folder:
        folder = Path(args.folder).resolve()
        project = folder.parent / "pyproject.toml"
        if project not in written:
            print(f"{project} is there already; add to it, and pack the recipe (*.toml) with the package:")
            print(skeleton.entry_point(args.name, folder.name))
        print(f"then: pip install -e {folder.parent}")
    return 0
