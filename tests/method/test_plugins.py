"""Methods of other packages: found beside the shipped ones, and no harm to who does not ask for them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from commands import ROOT
from jobs import train_all
from plans import config_of, plan_of

from bench.errors import UserError
from bench.method import NETWORKS
from bench.method.registry import METHODS, method, method_names
from bench.models.network import Network
from bench.plan.make import make_plan
from bench.store.results import Store
from bench.testing.plugins import Offers

Toy = Callable[..., Path]
METHOD = '''
from bench.method import Later, Method


class Theirs(Method):
    """A method of another package."""

    title = "Theirs"

    class Config(Method.Config):
        """Hyper-parameters."""

        weight: Later[float] = 1.0
'''


class Site:
    """A folder of installed packages.

    Args:
        folder: where it is; it stands on sys.path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(self, package: str, points: Mapping[str, str], files: Mapping[str, str]) -> None:
        """Write a package: entry points of bench.methods, and its files by path."""
        about = self.folder / f"{package}-1.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        lines = "\n".join(f"{name} = {value}" for name, value in points.items())
        (about / "entry_points.txt").write_text(f"[bench.methods]\n{lines}\n")
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            self.modules.append(name.partition("/")[0].removesuffix(".py"))
        importlib.invalidate_caches()
        METHODS.forget()
        method.cache_clear()


@pytest.fixture
def site(in_tmp: Path, offer: Offers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    found = Site(in_tmp / "site")
    found.folder.mkdir()
    monkeypatch.syspath_prepend(found.folder)
    yield found
    for name in [n for n in sys.modules if n.partition(".")[0] in found.modules]:
        del sys.modules[name]


# ---- other packages ----------------------------------------------------------------------------------------


def test_a_method_of_another_package_stands_beside_the_shipped_ones(site: Site) -> None:
    toml = "[small]\nweight = 3"
    site.install("theirs", {"theirs": "their_method"}, {"their_method.py": METHOD, "their_method.toml": toml})
    assert "theirs" in method_names()
    spec = method("theirs")
    assert spec.title == "Theirs"
    assert config_of("theirs", "shapes-6-2", "small").weight == 3


def test_an_entry_point_may_name_one_class_of_several(site: Site) -> None:
    both = METHOD + "\n\nclass Second(Theirs):\n    title = 'Second'\n"
    files = {"their_method.py": both, "their_method.toml": ""}
    site.install("theirs", {"second": "their_method:Second", "either": "their_method"}, files)
    assert method("second").title == "Second"
    with pytest.raises(UserError, match="must hold exactly one class derived from Method, it holds 2"):
        method("either")


BROKEN = {
    "cannot be imported": (
        "broken",
        "raise RuntimeError('no luck')",
        "",
        r"'broken' \(entry point.*\): cannot be ",
    ),
    "imports what is not there": (
        "broken",
        "import nowhere_to_be_found",
        "",
        "No module named 'nowhere_to_be_",
    ),
    "holds no method": ("broken", "x = 1", "", "must hold exactly one class derived from Method, it holds 0"),
    "has no recipe": (
        "broken",
        METHOD,
        None,
        r"bad_method\.toml: not there; a method has a recipe beside it",
    ),
    "has a wrong recipe": ("broken", METHOD, "[metod]", "unknown table 'metod'; did you mean 'method'"),
    "sets what it has not": (
        "broken",
        METHOD,
        "[small]\nwieght = 1",
        "unknown setting 'wieght'; did you mean",
    ),
    "brings a taken name": (
        "mib",
        METHOD,
        "",
        "method 'mib': two have this name: .*methods/mib.* and entry point",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_plug_in_is_an_error_for_who_asks_for_it_alone(site: Site, what: str) -> None:
    name, text, toml, words = BROKEN[what]
    files = {"bad_method.py": text, **({} if toml is None else {"bad_method.toml": toml})}
    site.install("bad", {name: "bad_method"}, files)
    with pytest.raises(UserError, match=words) as caught:
        method(name)
    assert "\n" not in str(caught.value)
    others = ["ft", "plop", "nest+plop", "ewc"]
    plan = plan_of(others)
    assert [chain.method.partition("[")[0] for chain in plan.chains] == others
    assert METHODS.match(["pl*", "ss*"]) == ["plop", "ssul", "ssul-m"]
    assert "nest+plop" in METHODS.match(["nest+*"])
    assert f"nest+{name}" not in METHODS.match(["nest+*"])
    NETWORKS.find("small")
    with pytest.raises(UserError, match="unknown network 'smal'; did you mean 'small'"):
        NETWORKS.find("smal")
    with pytest.raises(UserError, match=words):
        plan_of([f"{name[:2]}*"])


def test_everything_warns_of_what_cannot_be_loaded(site: Site) -> None:
    site.install(
        "bad", {"bad": "bad_method", "ft": "bad_method"}, {"bad_method.py": "raise RuntimeError('no luck')"}
    )
    things, warnings = METHODS.everything()
    assert {"bad", "ft"} & set(things) == set()
    assert {"mib", "nest", "plop"} <= set(things)
    assert len(warnings) == 2
    assert (
        "method 'bad' (entry point of bench.methods: bad_method): cannot be loaded: RuntimeError"
        in warnings[0]
    )
    assert "method 'ft': two have this name" in warnings[1]
    listed = list_in_a_process(site)
    assert listed.returncode == 0
    assert "mib" in listed.stdout
    assert listed.stderr.count("WARNING: ") == 2
    assert "no luck" in listed.stderr


def list_in_a_process(site: Site) -> subprocess.CompletedProcess[str]:
    """`bench list methods` with these packages installed."""
    path = os.pathsep.join([str(ROOT), str(site.folder)])
    command = [sys.executable, "-m", "bench", "list", "methods"]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_a_method_that_imports_torch_is_told_how_not_to(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install(
        "eager",
        {"eager": "eager_method"},
        {"eager_method.py": f"import torch\n{METHOD}", "eager_method.toml": ""},
    )
    monkeypatch.setitem(sys.modules, "torch", None)  # a login node without it
    with pytest.raises(
        UserError, match=r"imports torch at its top; write `from bench\.lazy import F, torch`"
    ):
        method("eager")


FOLDER = {
    "doubled/__init__.py": '''
from bench.method import NETWORKS, Method


class Kind:
    """A network that only its own folder knows how to build."""

    says = "one convolution"
    weights = ""

    def carries(self, classifier):
        return classifier == "linear"

    def build(self, sizes, classifier, norm):
        from doubled.network import Doubled

        return Doubled(sizes)


NETWORKS.add("doubled-net", Kind())


class Doubling(Method):
    """A method that brings a network."""

    title = "Doubling"
''',
    "doubled/network.py": """
import torch

from bench.models.classifier import LinearClassifier
from bench.models.network import Network


class Body(torch.nn.Module):
    out_channels = 8

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, images):
        x = self.conv(images)
        return x, [x]


class Doubled(Network):
    def __init__(self, sizes):
        super().__init__(Body(), torch.nn.Identity(), LinearClassifier(8, sizes))
""",
    "doubled/doubled.toml": '[small]\nnetwork = "doubled-net"\n',
}
PLANS = """
import sys
from bench.commands.list import KINDS
from bench.data.index import ClassIndex
from bench.plan.make import make_plan
index = ClassIndex(tuple("abcdefghijklmnopqrst"), (0b11111111110,) * 20, "f" * 16)
plan = make_plan(["shapes-6-2"], ["doubling"], "small", indexes={"shapes": {"train": index, "test": index}})
assert {job.config.network for job in plan.jobs.values()} == {"doubled-net"}
assert "doubled-net" in [row["name"] for row in KINDS["networks"]().rows]
assert "doubled.network" not in sys.modules
assert not {"torch", "torchvision"} & set(sys.modules)
"""


def test_a_method_may_be_a_folder_that_brings_its_network(site: Site, toy: Toy) -> None:
    site.install("doubled", {"doubling": "doubled"}, FOLDER)
    path = os.pathsep.join([str(ROOT), str(site.folder)])
    subprocess.run([sys.executable, "-c", PLANS], env={**os.environ, "PYTHONPATH": path}, check=True)
    common = ["epochs=1", "first_epochs=1", "batch_size=4", "crop=32"]
    plan = make_plan([str(toy(then=2))], ["doubling"], overrides=common)
    session = train_all(plan, Store("r"))
    assert isinstance(session.method.network, Network)
    assert type(session.method.network).__name__ == "Doubled"
    assert session.method.network.classifier.sizes == [3, 2]
    assert all(Store("r").done(key) for key in plan.jobs)


def test_another_method_can_use_a_network_that_a_methods_folder_brings(site: Site) -> None:
    site.install("doubled", {"doubling": "doubled"}, FOLDER)
    plan = plan_of(["mib"], ["network=doubled-net"])
    assert {job.config.network for job in plan.jobs.values()} == {"doubled-net"}
    with pytest.raises(
        UserError, match="network = 'doubled-net': does not carry the classifier 'conv-heads'"
    ):
        plan_of(["ssul"], ["network=doubled-net"])
