"""`bench new-method`: a commented skeleton of a method, its recipe, a test that fails until it is filled, and
what a package needs to offer it."""

from __future__ import annotations

import re
from pathlib import Path

from bench import shipped
from bench.errors import UserError
from bench.method.registry import ENTRY_POINTS, method_names

METHOD = '''"""{title}: what it is, in one line (Authors, venue year).

What it adds to fine-tuning, in the paper's own terms, in three lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bench.lazy import F, torch  # not `import torch`: planning works without it
from bench.method import Later, Method

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch


def my_loss(logits: Tensor, logits_old: Tensor) -> Tensor:
    """One line of what it is.

    Args:
        logits: [B, C, H, W] of the network being trained, upsampled to the image.
        logits_old: [B, C_old, H, W] of the frozen network of the previous step, background included.

    Returns:
        A scalar.

    Source: paper, equation.
    """
    raise NotImplementedError("{name}: write the loss")


class {cls}(Method):
    """One line for `bench show method {name}`."""

    title = "{title}"
    paper = "Authors, venue year"
    first_step = "ft"  # shares the plain cross-entropy step 0; leave it out if step 0 is trained differently

    class Config(Method.Config):
        """Hyper-parameters of {title}; their values for a data set or protocol stand in {stem}.toml."""

        weight: Later[float] = Field(1.0, ge=0)
        """Weight of the loss. `Later` says that step 0 does not depend on it."""

    # Further hooks, each with a default: build_network, grow_network, own_modules, init_classifier,
    # start_step, setup, lengths, phases, parameter_groups, optimiser, batches, train_mode, observe,
    # penalties, end_step, predict. See bench/method/interface.py, and methods/mib.py for a short method,
    # methods/plop.py for a long one.

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().losses(batch)  # {{"ce": …}}
        if self.step.index:  # there is a teacher from step 1 on
            terms["mine"] = self.config.weight * my_loss(batch.output.logits, batch.teacher.logits)
        return terms
'''

RECIPE = """# {title}. [method]: its own hyper-parameters, in every track.
# Per data set or protocol: [method.ade], [method.voc-15-1].

[method]
weight = 1.0

# How the authors trained it, for the track "published"; `like` takes over another method's training settings.
# [published]
# like = "mib"
#
# [published.voc]
# epochs = 30
"""

TEST = '''"""{title} trains its steps; this test fails until the method is filled in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench
from bench.store.results import Store


def test_{stem}_trains_and_is_not_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, store = bench.run("shapes-6-2", ["ft", "{name}"], cluster="inline", smoke=True), Store(smoke=True)
    assert run.outcome.ok, [store.state(key).failure for key in run.outcome.failed]
    ft, mine = (chain.keys[-1] for chain in run.plan.chains)
    weights = [(store.artifact(key) / "model.safetensors").read_bytes() for key in (ft, mine)]
    assert weights[0] != weights[1]
    log = (store.artifact(mine) / "train.jsonl").read_text().splitlines()
    terms = set(json.loads(log[0])) - {{"phase", "epoch", "iteration", "lr"}}
    assert terms > {{"ce"}}, "no loss of its own"
'''


PACKAGE = """[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "{project}"
version = "0.1"
dependencies = ["ciss-bench"]

{entry_point}

[tool.setuptools]
packages = ["{package}"]

[tool.setuptools.package-data]
{package} = ["*.toml"]
"""


def write(name: str, folder: str | None = None) -> list[Path]:
    """Write the files of a method; nothing that exists is overwritten.

    Args:
        name: of the method, as the command line will take it: lower case, digits and dashes.
        folder: of the package that is to hold the method; None: methods/ of this checkout. The test goes to
            tests/ beside that folder, and so does a pyproject.toml if the package has none yet.

    Returns:
        Paths of what was written.

    Raises:
        UserError: a name that cannot be one, that is taken, or no folder to write to.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        rule = "a name has lower-case letters, digits and dashes, and begins with a letter"
        raise UserError(f"new-method {name}: {rule}")
    if name in method_names():
        what = f"there is a method of this name already (bench show method {name})"
        raise UserError(f"new-method {name}: {what}")
    checkout = shipped.PACKAGE.parent
    if folder is None and not (checkout / "pyproject.toml").is_file():
        cure = "say where the method's file goes with --folder DIR"
        raise UserError(f"new-method: this is an installed package; {cure}")
    home = Path(folder).resolve() if folder else checkout / "methods"
    stem = name.replace("-", "_")
    title = name.upper() if len(name) < 5 else name.capitalize()
    words = {"name": name, "stem": stem, "title": title, "cls": stem.title().replace("_", "")}
    files = {
        home / f"{stem}.py": METHOD.format(**words),
        home / f"{stem}.toml": RECIPE.format(**words),
        home.parent / "tests" / f"test_{stem}.py": TEST.format(**words),
    }
    for path in files:
        if path.exists():
            raise UserError(f"new-method {name}: {path} exists already")
    if folder:
        files |= {path: text for path, text in _package(name, home).items() if not path.exists()}
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"new-method {name}: {home}: cannot be written ({error.strerror})") from None
    return list(files)


def _package(name: str, home: Path) -> dict[Path, str]:
    """What makes a folder a package that offers the method."""
    if not home.name.isidentifier():
        rule = "the folder is a Python package: its name has letters, digits and underscores"
        raise UserError(f"new-method {name}: --folder {home.name}: {rule}")
    project = home.name.replace("_", "-")
    lines = PACKAGE.format(project=project, package=home.name, entry_point=entry_point(name, home.name))
    return {home / "__init__.py": "", home.parent / "pyproject.toml": lines}


def entry_point(name: str, package: str) -> str:
    """The lines of a pyproject.toml by which an outside package offers a method."""
    stem = name.replace("-", "_")
    return f'[project.entry-points."{ENTRY_POINTS}"]\n{name} = "{package}.{stem}"'
