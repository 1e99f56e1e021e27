"""The Python interface: what the command line does, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.launch.driver import Outcome
    from bench.plan.plan import Plan


@dataclass(frozen=True)
class Run:
    """A finished run: its plan, how its jobs ended, and the paths of its report by format."""

    plan: Plan
    outcome: Outcome
    report: Mapping[str, Path]


def run(
    protocol: str | Sequence[str],
    methods: str | Sequence[str],
    track: str | None = None,
    seeds: int | Sequence[int] = (0,),
    set: Sequence[str] | Mapping[str, object] = (),
    setting: str | None = None,
    data_root: str | Path | None = None,
    results: str | Path | None = None,
    cluster: str = "local",
    jobs: int | None = None,
    profile: str | None = None,
    smoke: bool = False,
    force: bool = False,
    keep_failed: bool = False,
    detach: bool = False,
    show: bool = False,
    reports: str | Path = "reports",
) -> Run:
    """Train every step of every method on the protocols and render the report.

    Args:
        protocol, methods: one or several names, with wildcards (`voc-15-*`, `nest+*`).
        track: a name of `bench list tracks`; None: the data set's own.
        seeds: one chain each.
        set: hyper-parameters: {"mib.distillation": 20}, or items as the command line takes them.
        setting: a name of `bench list settings`; None: the protocol file's.
        data_root: where the data set is.
        results: the results folder.
        cluster: "inline", "local" or "slurm".
        jobs: at once on this machine; None: one a GPU, else as many as cores and memory carry.
        profile: of the cluster.
        smoke: two iterations a step.
        force: train again what is done.
        keep_failed: leave failed jobs as they are.
        detach: with "slurm": submit and return.
        show: live progress on the terminal, and the table at the end.
        reports: folder of the report.

    Raises:
        bench.errors.UserError: for anything that can be mended before training.
    """
    from bench.errors import UserError
    from bench.files import check_writable
    from bench.launch.choose import make_executor
    from bench.launch.display import Display
    from bench.launch.driver import Driver, most_threads
    from bench.plan.make import make_plan
    from bench.store.results import Store

    seeds = [seeds] if isinstance(seeds, int) else seeds
    overrides = [f"{key}={value}" for key, value in set.items()] if isinstance(set, Mapping) else list(set)
    plan = make_plan(_list(protocol), _list(methods), track, seeds, overrides, setting, data_root, smoke)
    store = Store(results, smoke)
    try:
        check_writable(Path(reports))
    except OSError as error:
        cure = "choose another with --out DIR"
        raise UserError(f"report folder {reports}: cannot be written ({error.strerror}); {cure}") from None
    executor = make_executor(cluster, store, jobs, profile, most_threads(plan))
    with Display(plan, store, live=show) as display:
        for warning in plan.warnings:
            display.say(f"WARNING: {warning}")
        driver = Driver(plan, store, executor, force, keep_failed, display.update)
        outcome = driver.detach() if detach else driver.run()
    display.finish(driver)
    written: Mapping[str, Path] = {}
    if not detach and not outcome.stopped and any(True for _ in store.links()):
        names = sorted({chain.protocol.label for chain in plan.chains})
        if show:
            from bench.report import terminal_text

            print(terminal_text(store, names), flush=True)
        written = report(results, reports, smoke=smoke)
        if show:
            print("\n".join(str(path) for path in written.values()), flush=True)
    return Run(plan, outcome, written)


def report(
    results: str | Path | None = None,
    out: str | Path = "reports",
    convention: str = "default",
    protocol: str | Sequence[str] | None = None,
    smoke: bool = False,
) -> Mapping[str, Path]:
    """Render what is in the results folder.

    Args:
        results: the results folder.
        out: where the files go.
        convention: how mIoU is averaged (bench list conventions).
        protocol: these protocols only.
        smoke: of smoke runs; the files go to a folder "smoke" in `out`.

    Returns:
        Paths by format: "markdown", "html", "latex", "csv".
    """
    from bench.report import render_all
    from bench.store.results import Store

    folder = Path(out) / "smoke" if smoke else Path(out)
    return render_all(
        Store(results, smoke), folder, convention, None if protocol is None else _list(protocol)
    )


def _list(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
