"""Labels of a step as each family of authors has them, value by value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.data.dataset import load_dataset
from bench.errors import UserError
from bench.protocol import load
from bench.protocol.labels import INDEX, RULES, View, lookup_table, rule, training_table


def test_training_keeps_the_new_classes_alone() -> None:
    table = training_table(load("voc-15-1"), 1, "plop")
    assert table[16] == 16
    assert table[[0, 1, 15, 17, 20]].tolist() == [0] * 5
    assert table[255] == 255
    assert training_table(load("voc-15-1"), 1, "mib")[255] == 0


def test_channels_follow_the_order_of_the_protocol() -> None:
    p = load("voc-15-1-b")
    table = training_table(p, 0, "plop")
    assert [int(table[c]) for c in p.groups[0]] == list(range(1, 16))


FAMILIES = {
    ("mib", "voc"): ("0 . 0 0 0", "0 . x x x", "0 . . x x"),
    ("mib", "ade"): ("0 . 0 0 0", "x . x x x", "x . . x x"),
    ("plop", "voc"): ("0 . 0 0 x", "0 . 0 0 x", "0 . . 0 x"),
    ("plop", "ade"): ("0 . 0 0 0", "0 . 0 0 0", "0 . . 0 0"),
    ("plop-ignore-background", "voc"): ("0 . 0 0 x", "0 . 0 0 x", "x . . x x"),
    ("plop-ignore-background", "ade"): ("0 . 0 0 0", "0 . 0 0 0", "x . . x x"),
    ("ssul", "voc"): ("0 . 0 0 x", "0 . 0 0 x", "0 . . . x"),
    ("ssul", "ade"): ("0 . 0 0 x", "0 . 0 0 x", "0 . . . x"),
    ("mbs", "voc"): ("0 . 0 0 x", "0 . 0 0 x", "0 . . . x"),
    ("mbs", "ade"): ("0 . 0 0 0", "0 . 0 0 0", "x . . . x"),
    ("eir", "voc"): ("0 . 0 0 x", "0 . 0 0 x", "0 . . 0 x"),
    ("eir", "ade"): ("0 . 0 0 x", "0 . 0 0 x", "0 . . x x"),
}
"""By rule and data set: training, validation, test; in each what becomes of background, new, old and future
classes, void: 0, ignored (x) or its own channel (.). Source: spec/protocol.md section 3, spec/eir.md section
2."""


@pytest.mark.parametrize(("name", "dataset"), FAMILIES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_value_of_every_family(name: str, dataset: str, index: int) -> None:
    p = load({"voc": "voc-15-1-b", "ade": "ade-100-10"}[dataset])
    new = set(p.groups[index])
    old = {c for group in p.groups[:index] for c in group}
    values = {v: c for v, c in p.dataset.raw_to_id().items() if c != 255}
    for use, words in zip(("train", "validation", "test"), FAMILIES[name, dataset], strict=True):
        background, _, of_old, of_future, void = words.split()
        expected = np.full(256, 255)
        for value, c in values.items():
            how = background if c == 0 else "." if c in new else of_old if c in old else of_future
            expected[value] = {"0": 0, "x": 255, ".": p.order.index(c)}[how]
        expected[255] = 255 if void == "x" else 0
        found = lookup_table(rule(name).view(use, p.dataset), p.dataset, p.order, p.step(index))
        assert found.tolist() == expected.tolist(), use


def test_every_rule_stands_above() -> None:
    assert {name for name, _ in FAMILIES} == set(RULES.known())


def test_files_that_count_from_zero_are_shifted() -> None:
    table = training_table(load("camvid-6-5"), 0, "plop")
    assert table[:12].tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 255]


def test_values_of_no_class_are_ignored() -> None:
    assert (training_table(load("voc-15-1"), 0, "plop")[21:255] == 255).all()


@given(
    st.sampled_from(RULES.known()),
    st.sampled_from(["train", "validation", "test"]),
    st.sampled_from(["voc", "ade"]),
    st.integers(0, 1),
)
def test_a_view_never_invents_a_channel(name: str, use: str, dataset: str, index: int) -> None:
    p = load(f"{dataset}-{'15-5' if dataset == 'voc' else '100-50'}")
    step = p.step(index)
    table = lookup_table(rule(name).view(use, p.dataset), p.dataset, p.order, step)
    seen = set(table.tolist()) - {255}
    limit = len(p.order) if rule(name).view(use, p.dataset).future == INDEX else step.n_classes
    assert seen <= set(range(limit))
    for c in step.classes:
        assert table[c] == p.order.index(c)


def test_images_are_chosen_as_each_family_does() -> None:
    p = load("voc-15-1", "disjoint")
    presence = [0b10, 1 << 16, (1 << 16) | (1 << 20), 1 << 20]
    assert rule("plop").images("train", p, 1, presence) == [1]
    assert rule("plop").images("validation", p, 1, presence) == [1, 2]
    assert rule("ssul").images("validation", p, 1, presence) == [1]
    assert rule("plop").images("test", p, 1, presence) == [0, 1, 2]
    assert rule("ssul").images("test", p, 1, presence) == [0, 1, 2, 3]


def test_unknown_rule() -> None:
    with pytest.raises(UserError, match="did you mean 'ssul'"):
        rule("sul")


def test_a_table_is_one_byte_a_value() -> None:
    dataset = load_dataset("voc")
    table = lookup_table(View(0, INDEX, 255, 255), dataset, range(21), load("voc-15-5").step(1))
    assert table.dtype == np.uint8
    assert table.shape == (256,)
