"""The command line: parse, call the command asked for, exit status. Only its module is imported."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from bench.errors import UserError, unknown

COMMANDS = {
    "run": "Train every step of every method on a protocol, and print the table.",
    "plan": "Print the jobs of a run: shared, done, images and iterations. Trains nothing.",
    "list": "List what is known.",
    "show": "Show one thing in full.",
    "status": "What is done, running, failed: read from the results folder, from any terminal.",
    "report": "Render tables of everything in the results folder: Markdown, HTML, LaTeX and CSV.",
    "doctor": "Look at what runs need here: packages, GPUs, scheduler, data, weights, locks, disk.",
    "new-method": "Write a skeleton of a method, its recipe, and a test that fails until it is filled.",
}
"""Each is a module of bench.commands: add(parser) says what it takes, run(args) does it."""

HELP = """usage: bench [--version] COMMAND ...

Benchmark harness for class-incremental semantic segmentation.

commands (bench COMMAND --help):
{commands}

options:
  -h, --help  show this help message and exit
  --version   print the version and exit

examples:
  bench run --protocol shapes-6-2 --methods joint,ft,lwf,mib,plop,ssul
  bench run --protocol voc-15-1 --methods mib,plop,ssul --data-root ~/VOCdevkit --cluster slurm"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, with the nearest word that is allowed."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong:
            message = str(unknown("word", wrong[1], re.findall(r"[\w-]+", wrong[2])))
        self.exit(2, f"bench: error: {message} (see {self.prog} --help)\n")


def module_of(command: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"bench.commands.{command.replace('-', '_')}")


def parser(command: str) -> argparse.ArgumentParser:
    """The command line of one command."""
    module = module_of(command)
    found = Parser(
        prog=f"bench {command}",
        description=COMMANDS[command],
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add(found)
    return found


def help_text() -> str:
    """What `bench --help` prints."""
    width = max(map(len, COMMANDS))
    return HELP.format(commands="\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 if jobs failed, 2 for a user's error, 130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0 if words else 2
    if words[0] == "--version":
        from bench import __version__

        print(f"ciss-bench {__version__}")
        return 0
    command = words[0]
    if command not in COMMANDS:
        print(f"bench: error: {unknown('word', command, COMMANDS)} (see bench --help)", file=sys.stderr)
        return 2
    args = parser(command).parse_args(words[1:])
    try:
        return int(module_of(command).run(args))
    except UserError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away; what a run could not say is not known to be well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(command == "run")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f"{error.filename}: " if error.filename else ""
        cure = "make room and run the same command again to go on"
        print(f"bench: error: {where}{error.strerror}; {cure}", file=sys.stderr)
        return 2
