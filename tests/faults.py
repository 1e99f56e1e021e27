"""Faults that the tests must notice: each is a small patch of bench/ or methods/, tried in a copy of the
project, one at a time.

`python tests/faults.py` applies each, runs the tests that concern it against the copy, and says which test
noticed it. A patch that no longer applies, or that breaks the import, is an error: it proves nothing. So is a
test that fails without the fault. The faults are data: tests/faults/*.toml, one file a part of the project.
CONTRIBUTING.md says when to run this; it is not part of the test suite.
"""

from __future__ import annotations

import argparse
import itertools
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from bench.errors import UserError
from bench.files import Table, read_toml

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "tests" / "faults"
ALLOWED = 2
"""So many faults may survive, each with a word in its `survives` that says why."""
PATIENCE = 600
"""Seconds after which a run of tests counts as hanging."""
FAILED, NOTHING_FAILED = 1, 0
"""Exit statuses of pytest; any other says that the tests did not run."""
FIRST_TIME = 1_000_000_000
"""Patched files get times of their own, counted from here: compiled files of another patch never fit."""


class Fault(Table):
    """One fault."""

    name: str
    """In a few words."""
    file: str
    """The file that it is in."""
    old: str = Field(min_length=1)
    """Text that stands in the file exactly once."""
    new: str
    """Text in its place."""
    seen: str
    """What a user would see."""
    tests: tuple[str, ...] = Field(min_length=1)
    """Words for pytest: the tests that concern it."""
    survives: str = ""
    """Why no test notices it; "" for a fault that one must notice."""


class Faults(Table):
    """A file of faults."""

    fault: tuple[Fault, ...]


@dataclass(frozen=True)
class Found:
    """What became of a fault.

    Attributes:
        fault: which one.
        killer: the test that noticed it; "" if none did.
        error: why nothing was proven, or "".
        seconds: of the tests.
    """

    fault: Fault
    killer: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def says(self) -> str:
        return f"ERROR: {self.error}" if self.error else self.killer or "SURVIVED"


def faults() -> list[Fault]:
    """All faults, in the order of their files."""
    found = [fault for path in sorted(LISTS.glob("*.toml")) for fault in read_toml(path, Faults).fault]
    names = [fault.name for fault in found]
    for name in {name for name in names if names.count(name) > 1}:
        raise UserError(f"{LISTS}: two faults are called {name!r}")
    return found


def patched(text: str, fault: Fault) -> str:
    """The file's text with the fault in it.

    Raises:
        UserError: it does not apply.
    """
    n = text.count(fault.old)
    if n != 1:
        raise UserError(f"the old text stands {n} times in {fault.file}, not once")
    if fault.new == fault.old:
        raise UserError("the new text is the old one")
    return text.replace(fault.old, fault.new)


def failures(out: str) -> list[str]:
    """The tests that failed, or whose fixtures did, by what pytest printed."""
    lines = [line for line in out.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return [line.partition(" ")[2].split(" - ")[0] for line in lines]


class Copy:
    """A copy of the project, in which tests run against the copy's own code.

    Args:
        folder: an empty one.
    """

    times = itertools.count(FIRST_TIME)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # else it is deleted, and not yet told so
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        self.environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
        if (ROOT.parent / "shared").is_dir():  # as .ci/run says it
            self.environment.setdefault("CISS_BENCH_SHARED", str(ROOT.parent / "shared"))
        self.check()

    def check(self) -> None:
        """The code that tests import is the copy's: what is found in the checkout would never be faulty."""
        words = "import bench, methods; print(bench.__file__, *methods.__path__, sep='\\n')"
        status, out = self._run([sys.executable, "-c", words])
        places = [Path(line).resolve() for line in out.split("\n") if line]
        if status or not all(place.is_relative_to(self.folder.resolve()) for place in places):
            raise UserError(f"the copy's code is not the one that is imported: {out}")

    def _run(self, command: list[str]) -> tuple[int, str]:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return done.returncode, done.stdout

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        now = next(self.times)
        os.utime(path, (now, now))

    def test(self, *words: str, at_once: bool = True) -> tuple[int, str]:
        """Run some tests, `at_once` until the first fails: pytest's status and output."""
        quiet = ["-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *(["-x"] if at_once else [])]
        return self._run([sys.executable, "-m", "pytest", *quiet, *words])

    def tried(self, fault: Fault) -> Found:
        """What becomes of a fault; the copy is left as it was."""
        begun = time.monotonic()
        text = (self.folder / fault.file).read_text(encoding="utf-8")
        try:
            self.write(fault.file, patched(text, fault))
            status, out = self.test(*fault.tests)
        except (UserError, subprocess.TimeoutExpired) as error:
            return Found(fault, error=str(error))
        finally:
            self.write(fault.file, text)
        seconds = time.monotonic() - begun
        failed = failures(out)
        if status == FAILED and failed:
            return Found(fault, failed[0], seconds=seconds)
        if status == NOTHING_FAILED:
            return Found(fault, seconds=seconds)
        last = " ".join(out.split())[-300:]
        return Found(fault, error=f"pytest ended with status {status}: {last}", seconds=seconds)


def unfounded(copy: Copy, found: list[Found]) -> set[str]:
    """Those killers that fail without a fault too."""
    killers = sorted({one.killer for one in found if one.killer})
    return set(failures(copy.test(*killers, at_once=False)[1])) if killers else set()


def try_all(wanted: list[Fault], jobs: int) -> list[Found]:
    """What becomes of each fault, in order; lines are printed as they come."""
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(jobs) as pool:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(jobs):
            folder = Path(place) / str(number)
            folder.mkdir()
            copies.put(Copy(folder))

        def tried(fault: Fault) -> Found:
            copy = copies.get()
            try:
                found = copy.tried(fault)
            finally:
                copies.put(copy)
            print(f"{found.seconds:5.0f} s  {fault.name}: {found.says}", flush=True)
            return found

        found = list(pool.map(tried, wanted))
        without_cause = unfounded(copies.get(), found)
    return [
        Found(one.fault, error=f"{one.killer} fails without the fault too", seconds=one.seconds)
        if one.killer in without_cause
        else one
        for one in found
    ]


def table(found: list[Found]) -> str:
    """The faults in Markdown: where, what a user would see, which test noticed it, seconds."""
    lines = ["| fault | file | a user would see | noticed by | s |", "|---|---|---|---|---|"]
    for one in found:
        fault, why = one.fault, f" ({one.fault.survives})" if one.fault.survives and not one.killer else ""
        cells = (fault.name, fault.file, fault.seen, f"{one.says}{why}", f"{one.seconds:.0f}")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Try the faults; 1 if more survive than may, or one proves nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", default="", metavar="WORDS", help="faults with all these words")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="copies at work at once")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    words = given.only.lower().split()
    wanted = [f for f in faults() if all(word in f"{f.name} {f.file}".lower() for word in words)]
    if not wanted:
        print(f"--only {given.only!r}: no such fault", file=sys.stderr)
        return 2
    found = try_all(wanted, max(1, given.jobs))
    survivors = [one for one in found if not one.killer and not one.error]
    errors = [one for one in found if one.error]
    unexplained = [one for one in survivors if not one.fault.survives]
    print(f"\n{table(found)}\n")
    print(
        f"{len(found)} faults, {len(survivors)} survived ({len(unexplained)} of them without a reason), "
        f"{len(errors)} errors, {time.monotonic() - begun:.0f} seconds"
    )
    return int(len(survivors) > ALLOWED or bool(errors) or bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
