"""What a SLURM cluster is asked for: profiles, files slurm/<name>.toml."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from bench import shipped
from bench.errors import UserError
from bench.files import Table, read_toml
from bench.names import Entry, Registry

DEFAULT = "default"
Option = str | int | float | bool
"""A value of an option of sbatch."""


class Profile(Table):
    """What `bench run --cluster slurm` asks for, for each step."""

    partition: str = ""
    """Where jobs run; "" for the cluster's default."""
    account: str = ""
    """Who pays; "" for the user's default."""
    qos: str = ""
    """Quality of service; "" for the default."""
    time_min: int = Field(1440, ge=1)
    """Minutes; a step that needs more is put back into the queue and resumes from its last checkpoint."""
    gpus: int = Field(1, ge=0)
    """GPUs of a step, with one process each; batch_size is shared among them. 0: one process on the CPU."""
    cpus: int = Field(8, ge=1)
    """CPUs of each process."""
    mem_gb: float = Field(48, gt=0)
    """Memory of the machine's share, in gigabytes."""
    setup: tuple[str, ...] = ()
    """Shell commands before each step, for example "module load cuda"."""
    sbatch: dict[str, Option] = {}
    """Any other option of sbatch, for example constraint = "a100"."""
    poll_seconds: float = Field(10, gt=0)
    """How often the queue is asked."""
    max_queued: int = Field(1000, ge=1)
    """Jobs in the queue at once; the others follow as these end."""

    @field_validator("sbatch", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        wrong = (
            next((k for k, v in value.items() if not isinstance(v, Option)), None)
            if isinstance(value, dict)
            else None
        )
        if wrong is not None:
            raise ValueError(
                f"{wrong}: {value[wrong]!r} is no option's value; allowed: text, a number, true or false"
            )
        return value


def _shipped() -> dict[str, Entry[Profile]]:
    paths = shipped.folder("slurm").glob("*.toml")
    return {path.stem: Entry(functools.partial(read_toml, path, Profile), str(path)) for path in paths}


def _of_entry_point(point: importlib.metadata.EntryPoint) -> Profile:
    """A package names the path of a TOML file, or a `Profile`."""
    found = point.load()
    if isinstance(found, str | Path):
        return read_toml(Path(found), Profile)
    if not isinstance(found, Profile):
        what = f"{type(found).__name__} is neither a path nor a Profile"
        raise UserError(f"profile {point.name!r} ({point.value}): {what}")
    return found


PROFILES: Registry[Profile] = Registry("profile", "bench.profiles")
PROFILES.finders.append(_shipped)
PROFILES.of_entry_point = _of_entry_point


def load_profile(name: str | None) -> Profile:
    """A cluster profile by name (slurm/<name>.toml) or path; None: the default.

    Raises:
        UserError: no such profile, an unknown key, or a value that is not allowed.
    """
    name = name or DEFAULT
    if not name.endswith(".toml"):
        return PROFILES.find(name, "--profile")
    if not Path(name).is_file():
        raise UserError(f"--profile {name}: no such file")
    return read_toml(Path(name), Profile)
