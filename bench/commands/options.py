"""Options that several commands share, and how their words are read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from bench.errors import UserError

if TYPE_CHECKING:
    from bench.plan.plan import Plan


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What is run."""
    what = parser.add_argument_group("what is run")
    protocols = "protocols: names (bench list protocols), voc-15-*, or TOML files"
    what.add_argument("--protocol", required=True, metavar="NAME[,NAME]", help=protocols)
    methods = "methods: names, variants (mib@preset), compositions (nest+mib, nest+*)"
    what.add_argument("--methods", required=True, metavar="NAME[,NAME]", help=methods)
    what.add_argument("--track", help="a name of bench list tracks (default: the data set's)")
    what.add_argument("--seeds", default="0", metavar="N[,N]", help="one chain each (default: 0)")
    what.add_argument("--setting", help="a name of bench list settings (default: the protocol's)")
    add_set_option(what, "a hyper-parameter, or method.key=value; repeatable")
    what.add_argument(
        "--smoke", action="store_true", help="two iterations a step on a few images, results kept apart"
    )
    add_data_option(what, "where the data set is (default: $CISS_BENCH_DATA, ./data/<set>, ./data)")
    add_results_option(parser)


def add_set_option(parser: argparse._ActionsContainer, help: str) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=help
    )


def add_data_option(parser: argparse._ActionsContainer, help: str = "where the data set is") -> None:
    parser.add_argument("--data-root", metavar="DIR", help=help)


def add_results_option(parser: argparse._ActionsContainer) -> None:
    where = "the results folder (default: $CISS_BENCH_RESULTS or ./results)"
    parser.add_argument("--results", metavar="DIR", help=where)


def add_json_option(parser: argparse._ActionsContainer, help: str = "for machines") -> None:
    parser.add_argument("--json", action="store_true", help=help)


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that these options ask for."""
    from bench.plan.make import make_plan

    return make_plan(
        names(args.protocol),
        names(args.methods),
        args.track,
        seeds(args.seeds),
        args.overrides,
        args.setting,
        args.data_root,
        args.smoke,
    )


def names(text: str) -> list[str]:
    """Words between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def seeds(text: str) -> list[int]:
    """Whole numbers between commas."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--seeds {text}: write whole numbers, for example 0,1,2") from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
