"""`bench doctor`: one line for each thing that runs need."""

from __future__ import annotations

import argparse
import json

from bench.commands import options

EXAMPLES = """examples:
  bench doctor
  bench doctor --data-root ~/VOCdevkit
  bench doctor --json > doctor.json"""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_data_option(parser, "where one of the data sets is")
    options.add_results_option(parser)
    options.add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is found as it is found; 1 if something would make runs fail."""
    from bench.doctor import examine

    failed, found = 0, []
    for finding in examine(args.data_root, args.results):
        failed += finding.state == "fail"
        found.append(finding.as_json())
        if not args.json:
            print(finding, flush=True)
    if args.json:
        print(json.dumps(found, indent=1))
    return int(failed > 0)
