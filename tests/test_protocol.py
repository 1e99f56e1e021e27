from __future__ import annotations

import gzip
import itertools
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import protocol
from bench.data.dataset import load_dataset
from bench.data.index import ClassIndex, read_class_index
from bench.errors import UserError


def test_steps_and_channel_order() -> None:
    p = protocol.load("voc-15-1")
    assert [len(group) for group in p.groups] == [15, 1, 1, 1, 1, 1]
    assert p.order == tuple(range(21))
    step = p.step(2)
    assert (step.n_old, step.n_new, step.n_classes) == (17, 1, 18)
    assert step.classes == (17,)
    assert (p.step(0).n_old, p.step(0).n_new) == (0, 16)


def test_shuffled_order_keeps_its_order() -> None:
    p = protocol.load("voc-15-1-b")
    assert p.order[:4] == (0, 12, 9, 20)
    assert p.groups[-1] == (10,)


def test_every_shipped_protocol_learns_each_class_once() -> None:
    for name in protocol.names():
        p = protocol.load(name)
        assert sorted(p.order) == list(range(len(p.dataset.classes))), name


def test_the_label_carries_the_setting_unless_it_is_the_default() -> None:
    assert protocol.load("voc-15-1").label == "voc-15-1"
    assert protocol.load("voc-15-1", "disjoint").label == "voc-15-1-disjoint"


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
            p = protocol.load("voc-15-5" if name == "voc" else "ade-100-50", setting).at_once()
        else:
            p = protocol.load(f"{name}-{OFFICIAL.get(task, task)}", setting)
        choose = {"train": p.train_images, "val": p.validation_images, "test_on_val": p.test_images}[split]
        assert choose(int(step), indexes[name]["train" if split == "train" else "test"].presence) == expected, key


def test_image_counts_of_every_published_task(shared: Path, indexes: dict[str, dict[str, ClassIndex]]) -> None:
    """spec/protocols.json: counts of every task, computed from the masks."""
    tasks = json.loads((shared / "spec/protocols.json").read_text())
    checked = 0
    for name in ("voc", "ade"):
        for task, about in tasks[name].items():
            groups = tuple(tuple(c for c in group if c) for group in about["classes_per_step"])
            for setting, key in (("overlapped", "train_overlap"), ("disjoint", "train_disjoint")):
                p = replace(protocol.load(f"{name}-{'15-5' if name == 'voc' else '100-50'}", setting), groups=groups)
                for t, counts in enumerate(about.get("images_per_step", [])):
                    if key in counts:
                        assert len(p.train_images(t, indexes[name]["train"].presence)) == counts[key], (name, task, setting, t)
                        checked += 1
    assert checked > 300


# ---- properties --------------------------------------------------------------------------------------------------------

groupings = st.lists(st.integers(1, 20), min_size=1, max_size=20, unique=True).flatmap(
    lambda classes: st.lists(st.sampled_from(range(len(classes))), max_size=6, unique=True).map(
        lambda cuts: [g for g in (classes[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(classes)], strict=True)) if g]
    )
)
presences = st.lists(st.sets(st.integers(1, 20)).map(protocol.bits), max_size=40)


def voc(groups: list[list[int]], setting: str) -> protocol.Protocol:
    return protocol.parse({"dataset": "voc", "steps": groups}, Path("a/test.toml"), setting)


@given(groupings, presences)
def test_disjoint_images_are_overlapped_images_without_future_classes(groups: list[list[int]], presence: list[int]) -> None:
    over, disjoint = voc(groups, "overlapped"), voc(groups, "disjoint")
    for step in over.steps:
        wide, narrow = over.train_images(step.index, presence), disjoint.train_images(step.index, presence)
        assert set(narrow) <= set(wide)
        assert wide == sorted(wide)
        known = protocol.bits(step.seen)
        assert narrow == [i for i in wide if not presence[i] & ~known]


@given(groupings, presences)
def test_overlapped_covers_every_image_that_shows_a_learned_class(groups: list[list[int]], presence: list[int]) -> None:
    p = voc(groups, "overlapped")
    covered = {i for step in p.steps for i in p.train_images(step.index, presence)}
    assert covered == {i for i, shows in enumerate(presence) if shows & protocol.bits(p.order[1:])}


@given(groupings, presences)
def test_disjoint_gives_an_image_to_one_step_at_most(groups: list[list[int]], presence: list[int]) -> None:
    p = voc(groups, "disjoint")
    seen = [i for step in p.steps for i in p.train_images(step.index, presence)]
    assert len(seen) == len(set(seen))


@given(groupings, presences)
def test_partition_gives_each_image_with_a_class_to_one_step(groups: list[list[int]], presence: list[int]) -> None:
    p = voc(groups, "partition")
    seen = [i for step in p.steps for i in p.train_images(step.index, presence)]
    assert sorted(seen) == [i for i, shows in enumerate(presence) if shows & protocol.bits(p.order[1:])]


@given(groupings, presences)
def test_tested_images_only_grow(groups: list[list[int]], presence: list[int]) -> None:
    p = voc(groups, "overlapped")
    tested = [set(p.test_images(step.index, presence)) for step in p.steps]
    assert all(a <= b for a, b in itertools.pairwise(tested))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 30) | st.sampled_from(["", "voc", "disjoint", "x"]) | st.floats(-2, 40),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*protocol.KEYS, "frist"]), values, max_size=5))
def test_any_content_loads_or_is_refused_in_one_line(content: dict[str, object]) -> None:
    refusal = ""
    try:
        p = protocol.parse({"dataset": "voc", **content}, Path("protocols/test.toml"))
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
        ('dataset = "voc"\nfirst = 15\nthen = 1\nsteps = [[1]]', "not both"),
        ('dataset = "voc', "not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused_with_file_key_and_cure(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        protocol.load(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_under_which_results_keep_other_things(tmp_path: Path) -> None:
    path = tmp_path / "jobs.toml"
    path.write_text('dataset = "voc"\nfirst = 15\nthen = 1')
    with pytest.raises(UserError, match="a protocol cannot be called 'jobs'"):
        protocol.load(path)


def test_a_partition_of_itself_is_no_endless_loop(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "voc"\nfirst = 15\nthen = 1\npartition_of = "mine"')
    assert protocol.load(path).partition_groups == protocol.load(path).groups
    path.write_text('dataset = "voc"\nfirst = 15\nthen = 1\npartition_of = "yours"')
    with pytest.raises(UserError, match=r"partition_of: .*yours\.toml: no such protocol file"):
        protocol.load(path)


def test_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'voc-15-1'"):
        protocol.load("voc-15-11")


def test_shipped_files_are_plain_data() -> None:
    for path in (Path(protocol.__file__).parents[1] / "protocols").glob("*.toml"):
        assert set(tomllib.loads(path.read_text())) <= set(protocol.KEYS), path
