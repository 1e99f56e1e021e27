"""The command line: parse, call one function, print. It imports nothing heavy until a command needs it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from bench.errors import UserError, unknown

EXAMPLES = {
    "": """examples:
  bench run --protocol shapes-6-2 --methods joint,ft,lwf,mib,plop,ssul
  bench run --protocol voc-15-1 --methods mib,plop,ssul --data-root ~/VOCdevkit --cluster slurm""",
    "run": """examples:
  bench run --protocol shapes-6-2 --methods joint,ft,mib --seeds 0,1,2
  bench run --protocol voc-15-1,voc-10-1 --methods mib,plop --set mib.distillation=20 --data-root ~/VOCdevkit""",
    "plan": """examples:
  bench plan --protocol voc-15-1 --methods ft,lwf,mib,plop,ssul --track controlled
  bench plan --protocol ade-100-5 --methods mib@preset --json""",
    "list": """examples:
  bench list protocols
  bench list methods""",
    "show": """examples:
  bench show protocol voc-15-1 --data-root ~/VOCdevkit
  bench show method plop --protocol voc-15-1 --track published""",
    "status": """examples:
  bench status
  bench status --watch""",
    "report": """examples:
  bench report
  bench report --convention mib --out reports/mib""",
    "new-method": """examples:
  bench new-method my-method
  bench new-method my-method --folder ~/my-package""",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, with the nearest word that is allowed."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong:
            message = str(unknown("word", wrong[1], re.findall(r"[\w-]+", wrong[2])))
        self.exit(2, f"bench: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog="bench", description="Benchmark harness for class-incremental semantic segmentation.", epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, epilog=EXAMPLES[name], formatter_class=argparse.RawDescriptionHelpFormatter)

    run = command("run", "Train every step of every method on a protocol, and print the table.")
    _plan_options(run)
    where = run.add_argument_group("where it runs")
    where.add_argument("--cluster", default="local", help="inline (this process), local (default), or slurm")
    where.add_argument("--jobs", type=_positive, metavar="N", help="jobs at once on this machine (default: one a GPU, else up to four)")
    where.add_argument("--profile", metavar="NAME", help="cluster profile: a name of slurm/, or a TOML file (default: default)")
    where.add_argument("--detach", action="store_true", help="with --cluster slurm: submit and return")
    again = run.add_argument_group("what is done again")
    again.add_argument("--force", action="store_true", help="train every job of the plan again, also those that are done")
    again.add_argument("--keep-failed", action="store_true", help="leave failed jobs as they are (default: they are retried, from their last epoch)")
    run.add_argument("--out", metavar="DIR", default="reports", help="where the report goes (default: reports)")
    run.add_argument("--dry-run", action="store_true", help="only print the plan, as bench plan does")
    run.add_argument("--json", action="store_true", help="with --dry-run: for machines")

    plan = command("plan", "Print the jobs of a run: shared, done, images and iterations. Trains nothing.")
    _plan_options(plan)
    plan.add_argument("--force", action="store_true", help="as in bench run")
    plan.add_argument("--json", action="store_true", help="for machines")

    names = command("list", "List what is known.")
    names.add_argument("what", choices=["protocols", "methods", "datasets", "networks", "tracks", "conventions", "profiles"])
    names.add_argument("--json", action="store_true", help="for machines")

    show = command("show", "Show one thing in full.")
    kinds = show.add_subparsers(dest="kind", metavar="protocol|method", required=True)
    show_protocol = kinds.add_parser("protocol", help="classes by name, and image counts per step")
    show_protocol.add_argument("name")
    show_protocol.add_argument("--setting", help="overlapped, disjoint, or partition")
    show_protocol.add_argument("--data-root", metavar="DIR", help="where the data set is")
    show_protocol.add_argument("--class-index", metavar="FILE", help="count images by this class-index file (training split) alone")
    show_protocol.add_argument("--indices", action="store_true", help="add the training image list of each step")
    show_protocol.add_argument("--json", action="store_true", help="for machines")
    show_method = kinds.add_parser("method", help="what a method is, and every hyper-parameter with the source of its value")
    show_method.add_argument("name")
    show_method.add_argument("--protocol", metavar="NAME", help="the protocol whose recipe is resolved (default: voc-15-1)")
    show_method.add_argument("--track", help="published, controlled or small (default: the data set's)")
    show_method.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as in bench run")
    show_method.add_argument("--json", action="store_true", help="for machines")

    status = command("status", "What is done, running, failed: read from the results folder, from any terminal.")
    _results_option(status)
    status.add_argument("--smoke", action="store_true", help="of smoke runs")
    status.add_argument("--all", action="store_true", help="every run, not only the last")
    status.add_argument("--watch", action="store_true", help="keep showing it")
    status.add_argument("--json", action="store_true", help="for machines")

    report = command("report", "Render tables of everything in the results folder: Markdown, HTML, LaTeX and CSV.")
    _results_option(report)
    report.add_argument("--out", metavar="DIR", default="reports", help="where the files go (default: reports)")
    report.add_argument("--convention", default="default", help="how mIoU is averaged: default, mib, ssul, mbs, or eir")
    report.add_argument("--protocol", metavar="NAME[,NAME]", help="these protocols only")
    report.add_argument("--smoke", action="store_true", help="of smoke runs")

    new = command("new-method", "Write a commented skeleton of a method, its recipe, and a test that fails until it is filled.")
    new.add_argument("name")
    new.add_argument("--folder", metavar="DIR", help="the folder of the method's file (default: methods/ of this checkout)")
    return top


def _plan_options(p: argparse.ArgumentParser) -> None:
    what = p.add_argument_group("what is run")
    what.add_argument("--protocol", required=True, metavar="NAME[,NAME]", help="protocols: names (bench list protocols) or TOML files")
    what.add_argument("--methods", required=True, metavar="NAME[,NAME]", help="methods: names, variants (mib@preset), compositions (nest+mib)")
    what.add_argument("--track", help="published, controlled or small (default: the data set's)")
    what.add_argument("--seeds", default="0", metavar="N[,N]", help="one chain each (default: 0)")
    what.add_argument("--setting", help="overlapped (default), disjoint, or partition")
    what.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="a hyper-parameter, or method.key=value; repeatable"
    )
    what.add_argument("--smoke", action="store_true", help="two iterations a step on a few images, results kept apart")
    what.add_argument("--data-root", metavar="DIR", help="where the data set is (default: $CISS_BENCH_DATA, ./data/<set>, ./data)")
    _results_option(p)


def _results_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--results", metavar="DIR", help="the results folder (default: $CISS_BENCH_RESULTS or ./results)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--seeds {text}: write whole numbers, for example 0,1,2") from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 if jobs failed, 2 for a user's error, 130 if interrupted."""
    top = parser()
    args = top.parse_args(arguments)
    if args.version:
        from bench import __version__

        print(f"ciss-bench {__version__}")
        return 0
    if args.command is None:
        top.print_help()
        return 2
    try:
        return int(HANDLERS[args.command](args) or 0)
    except UserError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe went away; what a run could not say to the end is not known to be well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(args.command == "run")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"bench: error: {where}{error.strerror}; make room and run the same command again to go on", file=sys.stderr)
        return 2


# ---- one function a command --------------------------------------------------------------------------------------------


def _make_plan(args: argparse.Namespace) -> Any:
    from bench.plan import make_plan

    return make_plan(
        _names(args.protocol), _names(args.methods), args.track, _seeds(args.seeds), args.overrides, args.setting, args.data_root, args.smoke
    )


def _run(args: argparse.Namespace) -> int:
    if args.dry_run:
        return _plan(args)
    if args.json:
        raise UserError("--json: prints the plan of --dry-run; of a run itself, bench status --json")
    from bench import api

    run = api.run(
        protocol=_names(args.protocol), methods=_names(args.methods), track=args.track, seeds=_seeds(args.seeds), set=args.overrides,
        setting=args.setting, data_root=args.data_root, results=args.results, cluster=args.cluster, jobs=args.jobs, profile=args.profile,
        smoke=args.smoke, force=args.force, keep_failed=args.keep_failed, detach=args.detach, show=True, reports=args.out,
    )  # fmt: skip
    return 130 if run.outcome.stopped else int(not run.outcome.ok)


def _plan(args: argparse.Namespace) -> int:
    from bench import show
    from bench.store import Store

    plan = _make_plan(args)
    store = Store(args.results, args.smoke)
    print(json.dumps(show.plan_data(plan, store), indent=1) if args.json else show.plan_text(plan, store, args.force))
    return 0


def _list(args: argparse.Namespace) -> int:
    from bench import show

    rows = show.catalogue(args.what)
    print(json.dumps(rows, indent=1) if args.json else show.catalogue_text(args.what, rows))
    return 0


def _show(args: argparse.Namespace) -> int:
    from bench import show

    if args.kind == "protocol":
        data = show.protocol_data(args.name, args.setting, args.data_root, args.class_index, args.indices)
        print(json.dumps(data) if args.json else show.protocol_text(data))
    else:
        data = show.method_data(args.name, args.protocol or "voc-15-1", args.track, args.overrides)
        print(json.dumps(data, indent=1) if args.json else show.method_text(data))
    return 0


def _status(args: argparse.Namespace) -> int:
    from bench import status
    from bench.store import Store

    store = Store(args.results, args.smoke)
    if store.root.exists() and not store.root.is_dir():
        raise UserError(f"results folder {store.root}: a file, not a folder; name another with --results DIR")
    if args.json:
        print(json.dumps(status.status_data(store, args.all), indent=1))
    elif args.watch:
        status.watch(store, args.all)
    else:
        print(status.status_text(status.status_data(store, args.all), status.is_driven(store)))
    return 0


def _report(args: argparse.Namespace) -> int:
    from bench import api

    protocols = _names(args.protocol) if args.protocol else None
    written = api.report(results=args.results, out=args.out, convention=args.convention, protocol=protocols, smoke=args.smoke)
    for path in written.values():
        print(path)
    return 0


def _new_method(args: argparse.Namespace) -> int:
    from bench import skeleton

    for path in skeleton.write(args.name, args.folder):
        print(path)
    if args.folder:
        print("in the pyproject.toml of your package:\n" + skeleton.entry_point(args.name, Path(args.folder).name))
    return 0


HANDLERS = {
    "run": _run, "plan": _plan, "list": _list, "show": _show, "status": _status, "report": _report, "new-method": _new_method,
}  # fmt: skip
