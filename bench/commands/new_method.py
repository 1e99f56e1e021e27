"""`bench new-method`: a skeleton to fill in."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """examples:
  bench new-method my-method
  bench new-method my-method --folder ~/my-package"""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("name")
    folder = "the folder of the method's file (default: methods/ of this checkout)"
    parser.add_argument("--folder", metavar="DIR", help=folder)


def run(args: argparse.Namespace) -> int:
    """Write the files, and print their paths."""
    from bench.method import skeleton

    for path in skeleton.write(args.name, args.folder):
        print(path)
    if args.folder:
        print(
            "in the pyproject.toml of your package:\n"
            + skeleton.entry_point(args.name, Path(args.folder).name)
        )
    return 0
