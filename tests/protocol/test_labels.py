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
