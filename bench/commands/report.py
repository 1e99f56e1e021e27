"""`bench report`: tables of everything in the results folder."""

from __future__ import annotations

import argparse
import sys

from bench.commands import options

EXAMPLES = """examples:
  bench report
  bench report --convention mib --out reports/mib"""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_results_option(parser)
    parser.add_argument(
        "--out", metavar="DIR", default="reports", help="where the files go (default: reports)"
    )
    convention = "how mIoU is averaged: a name of bench list conventions"
    parser.add_argument("--convention", default="default", help=convention)
    parser.add_argument("--protocol", metavar="NAME[,NAME]", help="these protocols only")
    parser.add_argument("--smoke", action="store_true", help="of smoke runs")


def run(args: argparse.Namespace) -> int:
    """Render, and print the paths."""
    from bench import api
    from bench.report.collect import answers
    from bench.store.changes import change_lines, changes
    from bench.store.results import Store

    protocols = options.names(args.protocol) if args.protocol else None
    written = api.report(args.results, args.out, args.convention, protocols, args.smoke)
    for path in written.values():
        print(path)
    store = Store(args.results, args.smoke)
    told = [
        link.folder.resolve().name
        for link in store.links()
        if protocols is None or any(answers(link.protocol, wanted) for wanted in protocols)
    ]
    for line in change_lines(changes(store, dict.fromkeys(told)).values()):
        print(line, file=sys.stderr)
    return 0
