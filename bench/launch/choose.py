"""Which executor a run gets: --cluster and the options that go with it."""

from __future__ import annotations

from bench.errors import UserError, unknown
from bench.launch.executor import Executor, Inline
from bench.store.results import Store

CLUSTERS = ("inline", "local", "slurm")


def make_executor(
    cluster: str, store: Store, jobs: int | None = None, profile: str | None = None, threads: int = 1
) -> Executor:
    """The executor for --cluster.

    Args:
        cluster: "inline", "local" or "slurm".
        store: the results folder.
        jobs: at once, for "local"; None: one a GPU, else as many as cores and memory carry.
        profile: for "slurm": a name of slurm/ or a TOML file; None: the default.
        threads: the most that a job of the plan has on a CPU.

    Raises:
        UserError: an unknown cluster or profile, an option of another cluster, or no SLURM here.
    """
    if cluster not in CLUSTERS:
        raise unknown("cluster", cluster, CLUSTERS, where="--cluster")
    for option, value, owner in (("--jobs", jobs, "local"), ("--profile", profile, "slurm")):
        if value is not None and cluster != owner:
            raise UserError(f"{option} {value}: an option of --cluster {owner}, not of --cluster {cluster}")
    if cluster == "inline":
        return Inline(store)
    if cluster == "local":
        from bench.launch.local import Local, default_slots, visible_gpus

        gpus = visible_gpus()
        return Local(store, jobs or default_slots(gpus, threads), gpus)
    from bench.launch.profile import load_profile
    from bench.launch.slurm import Slurm

    return Slurm(store, load_profile(profile))
