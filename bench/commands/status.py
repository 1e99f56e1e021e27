"""`bench status`: what is done, running, failed."""

from __future__ import annotations

import argparse
import json

from bench.commands import options
from bench.errors import UserError

EXAMPLES = """examples:
  bench status
  bench status --watch"""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_results_option(parser)
    parser.add_argument("--smoke", action="store_true", help="of smoke runs")
    parser.add_argument("--all", action="store_true", help="every run, not only the last")
    parser.add_argument("--watch", action="store_true", help="keep showing it")
    options.add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the state of each job."""
    from bench.launch.status import is_driven, status_data
    from bench.store.results import Store

    store = Store(args.results, args.smoke)
    if store.root.exists() and not store.root.is_dir():
        raise UserError(f"results folder {store.root}: a file, not a folder; name another with --results DIR")
    if args.json:
        print(json.dumps([row.as_json() for row in status_data(store, args.all)], indent=1))
        return 0
    from bench.launch import display

    if args.watch:
        display.watch(store, args.all)
    else:
        print(display.status_text(status_data(store, args.all), is_driven(store)))
    return 0
