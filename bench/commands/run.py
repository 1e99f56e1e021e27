"""`bench run`: train, and print the table."""

from __future__ import annotations

import argparse

from bench.commands import options
from bench.errors import UserError

EXAMPLES = """examples:
  bench run --protocol shapes-6-2 --methods joint,ft,mib --seeds 0,1,2
  bench run --protocol voc-15-1,voc-10-1 --methods mib,plop --set mib.distillation=20"""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_plan_options(parser)
    where = parser.add_argument_group("where it runs")
    where.add_argument("--cluster", default="local", help="inline (this process), local (default), or slurm")
    jobs = "jobs at once on this machine (default: one a GPU, else as many as cores and memory carry)"
    where.add_argument("--jobs", type=options.positive, metavar="N", help=jobs)
    profile = "cluster profile: a name of bench list profiles, or a TOML file (default: default)"
    where.add_argument("--profile", metavar="NAME", help=profile)
    where.add_argument("--detach", action="store_true", help="with --cluster slurm: submit and return")
    again = parser.add_argument_group("what is done again")
    force = "train every job of the plan again, also those that are done"
    again.add_argument("--force", action="store_true", help=force)
    keep = "leave failed jobs, and what needs them, as they are"
    again.add_argument("--keep-failed", action="store_true", help=keep)
    out = parser.add_argument_group("what comes out")
    out.add_argument(
        "--out", metavar="DIR", default="reports", help="folder of the report (default: reports)"
    )
    out.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    options.add_json_option(out, "with --dry-run: for machines")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, 1 if jobs failed, 130 if stopped."""
    if args.dry_run:
        from bench.commands import plan

        return plan.run(args)
    if args.json:
        raise UserError("--json: prints the plan of --dry-run; of a run itself, bench status --json")
    from bench import api

    done = api.run(
        protocol=options.names(args.protocol), methods=options.names(args.methods), track=args.track,
        seeds=options.seeds(args.seeds), set=args.overrides, setting=args.setting, data_root=args.data_root,
        results=args.results, cluster=args.cluster, jobs=args.jobs, profile=args.profile, smoke=args.smoke,
        force=args.force, keep_failed=args.keep_failed, detach=args.detach, show=True, reports=args.out,
    )  # fmt: skip
    return 130 if done.outcome.stopped else int(not done.outcome.ok)
