"""Exemplar memory: what is drawn, and how it comes back."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.data.dataset import IGNORE
from bench.data.index import class_indexes
from bench.data.locate import locate
from bench.method import replay
from bench.method.batch import Batch
from bench.method.replay import Record, class_balanced_draw
from bench.method.settings import Settings
from bench.method.step_data import StepData
from bench.protocol.file import load
from methods.eir import potential_classes, single_instances
from methods.ssul import sigmoid_pseudo_labels
from methods.ssul_m import classes_shown

Toy = Callable[..., pathlib.Path]
GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "data"


def golden_cases(family: str, function: str) -> list[Any]:
    """(params, arrays) of each recorded case."""
    cases = [
        c for c in json.loads((GOLDEN / family / "manifest.json").read_text()) if c["function"] == function
    ]
    return [pytest.param(c["params"], np.load(GOLDEN / family / c["file"]), id=c["case"]) for c in cases]


def data_of(path: pathlib.Path, index: int, seed: int = 0, smoke: int | None = None) -> StepData:
    """Data of a step of the toy benchmark."""
    p = load(path)
    config = Settings(crop=24, batch_size=4)
    data = StepData(p, p.step(index), locate(p.dataset), class_indexes(p.dataset), config, seed, smoke=smoke)
    data.prepare = lambda raw: Batch(raw["images"], raw["labels"].long(), None, None, raw)  # type: ignore[arg-type]
    return data


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


# ---- against the authors' own draws, name by name (the vectors' arrays hold the sizes only) ----------------


@pytest.mark.parametrize(("params", "arrays"), golden_cases("ssul", "class_balanced_memory"))
def test_ssul_m_draws_the_authors_memory(params: dict[str, Any], arrays: Any) -> None:
    drawn: list[Record] = []
    for step, names in enumerate(params["image_names"], start=1):
        logits = tensor(arrays[f"prev_logits_step{step - 1}"]).float() if step > 1 else None
        shown = classes_shown(
            tensor(arrays[f"labels_step{step - 1}"]).long(),
            logits,
            int(params["unknown"]),
            params["pseudo_threshold"],
        )
        candidates = [*drawn, *map(Record, names, shown)]
        old = [c for earlier in range(step) for c in params["tasks"][str(earlier)] if c]
        drawn = class_balanced_draw(candidates, old, params["mem_size"], params["numpy_seed"])
        wanted = [
            (name, [c for c in labels if c != IGNORE - 1])
            for name, _, _, labels in params["memory_records"][step - 1]
        ]  # void, shifted
        assert [(record.name, record.labels) for record in drawn] == wanted
        assert sorted(record.name for record in drawn) == params["memory"][step - 1]


@pytest.mark.parametrize(("params", "arrays"), golden_cases("eir", "instance_memory"))
def test_eir_draws_the_authors_memory(params: dict[str, Any], arrays: Any) -> None:
    drawn: list[Record] = []
    for step, old in sorted(params["old_classes"].items(), key=lambda item: int(item[0])):
        shown = single_instances(tensor(arrays[f"labels_step{int(step) - 1}"]).long())
        names = params["image_names"][f"step{int(step) - 1}"]
        candidates = [
            *drawn,
            *(
                Record(name, classes)
                for name, classes in zip(names, shown, strict=True)
                if classes is not None
            ),
        ]
        drawn = class_balanced_draw(candidates, old, params["mem_size"], params["numpy_seed"])
        assert sorted(record.name for record in drawn) == params["memory"][int(step) - 1]
        for key, records in params["memory_by_class"][int(step) - 1].items():
            mine = [[r.name, r.labels] for r in drawn if r.drawn_for == int(key.removeprefix("class_"))]
            assert mine == [[name, [c for c in labels if c != IGNORE]] for name, labels in records]


@pytest.mark.parametrize(("params", "arrays"), golden_cases("eir", "pseudo_labels_and_potential_classes"))
def test_potential_classes_are_the_authors(params: dict[str, Any], arrays: Any) -> None:
    labels = tensor(arrays["labels"])
    pseudo_labels = sigmoid_pseudo_labels(tensor(arrays["prev_logits"]), labels, 0, params["threshold"])
    assert potential_classes(labels, pseudo_labels, params["max_classes"]) == params["potential_classes"]


# ---- drawing -----------------------------------------------------------------------------------------------


RECORDS = st.lists(st.sets(st.integers(1, 5), max_size=3), max_size=30).map(
    lambda shown: [Record(f"image{i}", sorted(classes)) for i, classes in enumerate(shown)]
)


@given(RECORDS, st.integers(0, 40), st.integers(0, 5))
def test_a_draw_takes_each_record_once_for_a_class_it_shows_and_is_full_if_it_can_be(
    candidates: list[Record], size: int, seed: int
) -> None:
    drawn = class_balanced_draw(candidates, range(1, 6), size, seed)
    assert drawn == class_balanced_draw(candidates, range(1, 6), size, seed)
    assert len({record.name for record in drawn}) == len(drawn)
    assert {(record.name, *record.labels) for record in drawn} <= {
        (record.name, *record.labels) for record in candidates
    }
    assert all(record.drawn_for in record.labels for record in drawn)
    assert len(drawn) == min(size, sum(bool(record.labels) for record in candidates))


def test_classes_take_turns() -> None:
    candidates = [Record(f"{c}-{i}", [c]) for c in (1, 2, 3, 4) for i in range(10)]
    counts = Counter(record.drawn_for for record in class_balanced_draw(candidates, [1, 2, 3, 4], 18))
    assert sorted(counts.values()) == [4, 4, 5, 5]


def test_a_rare_class_gets_what_there_is_and_the_others_the_rest() -> None:
    candidates = [Record("rare", [1]), *(Record(f"{i}", [2]) for i in range(10))]
    counts = Counter(record.drawn_for for record in class_balanced_draw(candidates, [1, 2, 3], 8))
    assert counts == {1: 1, 2: 7}


def test_shown_classes_are_without_background_void_and_unknown() -> None:
    labels = torch.tensor([[[0, 1, 2], [4, 4, 255]], [[0, 0, 0], [1, 1, 255]]])
    assert replay.shown_classes(labels) == [[1, 2, 4], [1]]
    assert replay.shown_classes(labels, last_not_foreground=1) == [[1, 3], []]


def test_records_survive_json() -> None:
    state = json.loads(
        json.dumps({replay.STATE: [Record("b", [1, 2], 2), Record("a", [3], 3), Record("b", [1], 1)]})
    )
    assert replay.kept(state) == [Record("b", [1, 2], 2), Record("a", [3], 3), Record("b", [1], 1)]
    assert sorted(record.name for record in replay.kept(state)) == ["a", "b", "b"]
    assert replay.kept({}) == []


def test_every_image_is_looked_at_once_in_list_order(toy: Toy) -> None:
    data = data_of(toy(n_classes=3, images=23), index=1)
    images = data.images(0, augmentation="center-crop")
    records = replay.look_through(data, images, lambda batch: replay.shown_classes(batch.labels))
    assert [record.name for record in records] == data.names(0)
    assert {c for record in records for c in record.labels} == {1, 2}  # as step 0 labels them
    few = replay.look_through(
        data, images, lambda batch: [None if i % 2 else [1] for i in batch.extra["index"].tolist()]
    )
    assert [record.name for record in few] == data.names(0)[::2]


def test_a_smoke_run_looks_at_a_few(toy: Toy) -> None:
    data = data_of(toy(n_classes=3, images=23), index=1, smoke=2)
    assert (
        len(replay.look_through(data, data.images(0), lambda batch: [[1]] * len(batch.labels)))
        == 2 * data.config.batch_size
    )


# ---- coming back -------------------------------------------------------------------------------------------


def test_half_of_every_batch_is_from_memory(toy: Toy) -> None:
    data = data_of(toy(n_classes=3, images=36), index=1)
    memory = data.images(1, ["train000", "train001"] * 2, table=data.all_seen_table())
    for epoch in (0, 1):
        new = list(data.loader(data.train, epoch))
        mixed = list(replay.HalfReplay(data, memory, epoch))
        assert len(mixed) == len(new) == len(replay.HalfReplay(data, memory, epoch)) > 1
        for before, after in zip(new, mixed, strict=True):
            assert int(after["replayed"].sum()) == 2
            kept = ~after["replayed"]
            assert all((after[name][kept] == before[name][kept]).all() for name in before)
            assert not (after["images"][~kept] == before["images"][~kept]).all()
            assert set(after["labels"][~kept].unique().tolist()) <= {0, 1, 2}
    assert any(
        not torch.equal(a["replayed"], b["replayed"])
        for a, b in zip(mixed, replay.HalfReplay(data, memory, 0), strict=True)
    )


def test_replayed_batches_follow_from_seed_step_and_epoch(toy: Toy) -> None:
    path = toy(n_classes=3, images=36)

    def epoch(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
        data = data_of(path, index=1, seed=seed)
        torch.manual_seed(number + seed + 17)  # the global generator plays no part
        return list(replay.HalfReplay(data, data.images(1, ["train000", "train001"] * 2), number))

    def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
        return all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)

    assert same(epoch(3, 0), epoch(3, 0))
    assert not same(epoch(3, 0), epoch(4, 0))
    assert not same(epoch(3, 0), epoch(3, 1))


def test_a_small_memory_is_doubled_until_it_fills_a_batch() -> None:
    assert replay.at_least_a_batch(["a", "b", "c"], 7) == ["a", "b", "c"] * 4
    assert replay.at_least_a_batch(["a", "b", "c"], 3) == ["a", "b", "c"]


def test_exemplars_behind_the_images_of_a_step(toy: Toy) -> None:
    data = data_of(toy(n_classes=3, images=24), index=1)
    memory = data.images(1, ["train000", "train001"], table=data.all_seen_table())
    together = replay.WithExemplars(data.train, memory)
    n = len(data.train)
    assert len(together) == n + 2
    for index, source, position in (
        (0, data.train, 0),
        (n - 1, data.train, n - 1),
        (n, memory, 0),
        (n + 1, memory, 1),
    ):
        sample = together[index, 5]
        assert sample["replayed"] is (index >= n)
        assert np.array_equal(sample["images"], source[position, 5]["images"])
    seen = torch.cat([batch["replayed"] for batch in data.loader(together, 0, drop_last=False)])
    assert (len(seen), int(seen.sum())) == (n + 2, 2)
