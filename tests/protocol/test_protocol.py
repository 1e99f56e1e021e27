from __future__ import annotations

import gzip
import importlib.metadata
import itertools
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from bench import shipped
from bench.data.dataset import load_dataset
from bench.data.index import ClassIndex, read_class_index
from bench.errors import UserError
from bench.names import Entry
from bench.protocol.file import PROTOCOLS, ProtocolFile, load, parse
from bench.protocol.images import SETTINGS, Setting, bits, showing
from bench.protocol.protocol import Protocol


def test_steps_and_channel_order() -> None:
    p = load("voc-15-1")
    assert [len(group) for group in p.groups] == [15, 1, 1, 1, 1, 1]
    assert p.order == tuple(range(21))
    step = p.step(2)
    assert (step.n_old, step.n_new, step.n_classes) == (17, 1, 18)
    assert step.classes == (17,)
    assert (p.step(0).n_old, p.step(0).n_new) == (0, 16)


def test_shuffled_order_keeps_its_order() -> None:
    p = load("voc-15-1-b")
    assert p.order[:4] == (0, 12, 9, 20)
    assert p.groups[-1] == (10,)


def test_every_shipped_protocol_learns_each_class_once() -> None:
    for name in PROTOCOLS.known():
        p = load(name)
        assert sorted(p.order) == list(range(len(p.dataset.classes))), name


def test_the_label_carries_the_setting_unless_it_is_the_default() -> None:
    assert load("voc-15-1").label == "voc-15-1"
    assert load("voc-15-1", "disjoint").label == "voc-15-1-disjoint"


OFFICIAL = {"15-5s": "15-1", "50": "50-50", "50b": "50-50-b", "100-50b": "100-50-b", "100-10b": "100-10-b"}


@pytest.fixture(scope="module")
def indexes(shared: Path) -> dict[str, dict[str, ClassIndex]]:
    return {
        name: {
            split: read_class_index(shared / f"data/{name}/{part}_classes.txt", load_dataset(name))
            for split, part in (("train", "train"), ("test", "val"))
        }
        for name in ("voc", "ade")
    }


def test_lists_equal_the_authors_own(shared: Path, indexes: dict[str, dict[str, ClassIndex]]) -> None:
    """All 117 image lists that MiB, PLOP and NeST ship, entry for entry."""
    with gzip.open(shared / "data/official-steps.json.gz") as file:
        official = json.load(file)
    assert len(official) == 117
    for key, expected in official.items():
        name, task, part = key.split("/")
        split, step = part.rsplit("-", 1)
        overlapped = task.endswith("-ov")
        task = task.removesuffix("-ov")
        setting = "overlapped" if overlapped else "partition" if name == "ade" else "disjoint"
        if task == "offline":
            p = load("voc-15-5" if name == "voc" else "ade-100-50", setting).at_once()
        else:
            p = load(f"{name}-{OFFICIAL.get(task, task)}", setting)
        choose = {"train": p.train_images, "val": p.validation_images, "test_on_val": p.test_images}[split]
        assert (
            choose(int(step), indexes[name]["train" if split == "train" else "test"].presence) == expected
        ), key


def test_image_counts_of_every_published_task(
    shared: Path, indexes: dict[str, dict[str, ClassIndex]]
) -> None:
    """spec/protocols.json: counts of every task, computed from the masks."""
    tasks = json.loads((shared / "spec/protocols.json").read_text())
    checked = 0
    for name in ("voc", "ade"):
        for task, about in tasks[name].items():
            groups = tuple(tuple(c for c in group if c) for group in about["classes_per_step"])
            for setting, key in (("overlapped", "train_overlap"), ("disjoint", "train_disjoint")):
                p = replace(load(f"{name}-{'15-5' if name == 'voc' else '100-50'}", setting), groups=groups)
                for t, counts in enumerate(about.get("images_per_step", [])):
                    if key in counts:
                        assert len(p.train_images(t, indexes[name]["train"].presence)) == counts[key], (
                            name,
                            task,
                            setting,
                            t,
                        )
                        checked += 1
    assert checked > 300


# ---- properties --------------------------------------------------------------------------------------------

groupings = st.lists(st.integers(1, 20), min_size=1, max_size=20, unique=True).flatmap(
    lambda classes: st.lists(st.sampled_from(range(len(classes))), max_size=6, unique=True).map(
        lambda cuts: [
            g
            for g in (
                classes[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(classes)], strict=True)
            )
            if g
        ]
    )
)
presences = st.lists(st.sets(st.integers(1, 20)).map(sorted).map(bits), max_size=40)


def voc(groups: list[list[int]], setting: str) -> Protocol:
    steps: Any = groups
    return parse({"dataset": "voc", "steps": steps}, Path("a/test.toml"), setting)


@given(groupings, presences)
def test_disjoint_images_are_overlapped_images_without_future_classes(
    groups: list[list[int]], presence: list[int]
) -> None:
    over, disjoint = voc(groups, "overlapped"), voc(groups, "disjoint")
    for step in over.steps:
        wide, narrow = over.train_images(step.index, presence), disjoint.train_images(step.index, presence)
        assert set(narrow) <= set(wide)
        assert wide == sorted(wide)
        known = bits(step.seen)
        assert narrow == [i for i in wide if not presence[i] & ~known]


@given(groupings, presences)
def test_overlapped_covers_every_image_that_shows_a_learned_class(
    groups: list[list[int]], presence: list[int]
) -> None:
    p = voc(groups, "overlapped")
    covered = {i for step in p.steps for i in p.train_images(step.index, presence)}
    assert covered == {i for i, shows in enumerate(presence) if shows & bits(p.order[1:])}


@given(groupings, presences)
def test_disjoint_gives_an_image_to_one_step_at_most(groups: list[list[int]], presence: list[int]) -> None:
    p = voc(groups, "disjoint")
    seen = [i for step in p.steps for i in p.train_images(step.index, presence)]
    assert len(seen) == len(set(seen))


@given(groupings, presences)
def test_partition_gives_each_image_with_a_class_to_one_step(
    groups: list[list[int]], presence: list[int]
) -> None:
    p = voc(groups, "partition")
    seen = [i for step in p.steps for i in p.train_images(step.index, presence)]
    assert sorted(seen) == [i for i, shows in enumerate(presence) if shows & bits(p.order[1:])]


@given(groupings, presences)
def test_tested_images_only_grow(groups: list[list[int]], presence: list[int]) -> None:
    p = voc(groups, "overlapped")
    tested = [set(p.test_images(step.index, presence)) for step in p.steps]
    assert all(a <= b for a, b in itertools.pairwise(tested))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 30)
    | st.sampled_from(["", "voc", "disjoint", "x"])
    | st.floats(-2, 40),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*ProtocolFile.model_fields, "frist"]), values, max_size=5))
@example({"first": 15, "then": 5})
@example({"steps": [[2, 1], [3]]})
def test_any_content_loads_or_is_refused_in_one_line(content: dict[str, Any]) -> None:
    refusal = ""
    try:
        p = parse({"dataset": "voc", **content}, Path("protocols/test.toml"))
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(("protocols/test.toml", "unknown", "protocols"))
        assert "\n" not in refusal
    else:
        assert len(set(p.order)) == len(p.order)
        assert all(p.groups)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('dataset = "voc"\nsteps = [[1, 2], [2]]', "class 2 (bicycle) is in step 0 and in step 1"),
        ('dataset = "voc"\nsteps = [[1], []]', "step 1 is empty"),
        ('dataset = "voc"\nsteps = []', "at least one step"),
        ('dataset = "voc"\nsteps = [[0, 1]]', "class 0 is out of range; allowed: 1 to 20"),
        ('dataset = "voc"\nsteps = [[21]]', "class 21 is out of range; allowed: 1 to 20"),
        ('dataset = "voc"\nfirst = 15\nthen = 2', "2 does not divide"),
        ('dataset = "voc"\nfirst = 0\nthen = 1', "first: 0 is not a number of classes"),
        ('dataset = "voc"\nfirst = 15', "then: missing"),
        ('dataset = "voc"\nfrist = 15\nthen = 1', "unknown key 'frist'; did you mean 'first'?"),
        ('dataset = "vox"\nfirst = 15\nthen = 1', "unknown data set 'vox'; did you mean 'voc'?"),
        ('dataset = "voc"\nsetting = "disjunct"\nfirst = 15\nthen = 1', "did you mean 'disjoint'?"),
        ("first = 15\nthen = 1", "dataset: missing"),
        ("dataset = 3\nfirst = 15\nthen = 1", "dataset = 3: Input should be a valid string"),
        ('dataset = "voc"\nfirst = "15"\nthen = 1', "first = '15': not a number of classes"),
        ('dataset = "voc"\nfirst = true\nthen = 1', "first = True: not a number of classes"),
        ('dataset = "voc"\nfirst = 21\nthen = 1', "first: 21 classes, but the order has only 20"),
        ('dataset = "voc"\nfirst = 1\nthen = 1\norder = 3', "order = 3: not a list of class ids"),
        ('dataset = "voc"\nsteps = [1, 2]', "steps = [1, 2]: not a list of lists of class ids, as in"),
        ('dataset = "voc"\nsteps = [[1.5]]', "steps = [[1.5]]: not a list of lists of class ids"),
        ('dataset = "voc"\nfirst = 15\nthen = 1\nversion = 0', "version = 0: Input should be greater than"),
        ('dataset = "voc"\nfirst = 15\nthen = 1\nsteps = [[1]]', "not both"),
        ('dataset = "voc', "not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused_with_file_key_and_cure(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_partition_of_itself_is_no_endless_loop(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "voc"\nfirst = 15\nthen = 1\npartition_of = "mine"')
    assert load(path).partition_groups == load(path).groups
    path.write_text('dataset = "voc"\nfirst = 15\nthen = 1\npartition_of = "yours"')
    with pytest.raises(UserError, match=r"partition_of: .*yours\.toml: no such protocol file"):
        load(path)


def test_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'voc-15-1'"):
        load("voc-15-11")


def test_shipped_files_are_plain_data() -> None:
    for path in shipped.folder("protocols").glob("*.toml"):
        assert set(tomllib.loads(path.read_text())) <= set(ProtocolFile.model_fields), path


def test_every_protocol_survives_json_and_can_be_hashed() -> None:
    adapter = TypeAdapter(Protocol)
    for name in PROTOCOLS.known():
        p = load(name)
        back = adapter.validate_json(adapter.dump_json(p))
        assert back == p
        assert hash(back) == hash(p)


def test_names_with_wildcards() -> None:
    assert PROTOCOLS.match(["shapes-*", "voc-15-1"]) == ["shapes-6-1", "shapes-6-2", "voc-15-1"]
    with pytest.raises(UserError, match="unknown protocol 'foc-"):
        PROTOCOLS.match(["foc-*"])


def test_a_setting_in_the_place_of_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "voc"\nfirst = 15\nthen = 1\nsetting = "disjoint"')
    assert load(path).setting == "disjoint"
    assert load(path, "partition").setting == "partition"
    for asked in (path, "voc-15-1"):
        with pytest.raises(
            UserError, match=r"^--setting: unknown setting 'disjunct'; did you mean 'disjoint'"
        ):
            load(asked, "disjunct")


def test_version_and_title_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "voc"\nfirst = 15\nthen = 1\nversion = 2\ntitle = "Mine"')
    assert (load(path).version, load(path).title, load(path).name) == (2, "Mine", "mine")
    assert load("voc-15-1").version == 1


def test_a_protocol_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "voc"\nfirst = 15\nthen = 1')
    (tmp_path / "packaged_protocol.py").write_text(f"FILE = {str(path)!r}\nNUMBER = 3\n")
    monkeypatch.syspath_prepend(tmp_path)

    def point(name: str) -> importlib.metadata.EntryPoint:
        return importlib.metadata.EntryPoint("theirs", f"packaged_protocol:{name}", "bench.protocols")

    assert PROTOCOLS.of_entry_point(point("FILE")).name == "theirs"
    with pytest.raises(UserError, match=r"protocol 'theirs' .*: int is neither a path nor a Protocol"):
        PROTOCOLS.of_entry_point(point("NUMBER"))


def test_a_plug_in_that_cannot_be_imported_is_a_warning_and_an_error_for_who_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> Protocol:
        raise ImportError("no module named theirs")

    monkeypatch.setattr(
        PROTOCOLS, "finders", [*PROTOCOLS.finders, lambda: {"theirs": Entry(broken, "a package")}]
    )
    PROTOCOLS.forget()
    found, warnings = PROTOCOLS.everything()
    assert "voc-15-1" in found
    assert warnings == [
        "protocol 'theirs' (a package): cannot be loaded: ImportError: no module named theirs"
    ]
    with pytest.raises(UserError, match="protocol 'theirs'"):
        load("theirs")
    monkeypatch.undo()
    PROTOCOLS.forget()


def test_a_setting_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SETTINGS, "_added", dict(SETTINGS._added))
    monkeypatch.setattr(SETTINGS, "_loaded", {})
    everything = Setting(
        "all that show a class so far", lambda classes, seen, groups, presence: showing(seen, presence)
    )
    SETTINGS.add("everything", everything)
    assert load("voc-15-1", "everything").train_images(1, [0b10, 1 << 16, 1 << 20, 0]) == [0, 1]
