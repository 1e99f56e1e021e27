"""Every input of a job decides its key, and a key is its inputs, also when they are read from disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from plans import INDEX, PROTOCOL, SHOWN, every_method, plan_of
from pydantic import Field

from bench.errors import UserError
from bench.method import Method, Settings
from bench.method.interface import Length
from bench.method.registry import METHODS
from bench.method.settings import First
from bench.plan.keys import content_digest, key_of
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.store.records import SCHEMA, EvaluationInputs, Inputs, parse_record
from bench.store.records import JobRecord as Record
from bench.store.results import Store
from bench.testing.plugins import Offers
from bench.testing.tensors import tensor_dataset

Toy = Callable[..., Path]


# ---- every input -------------------------------------------------------------------------------------------


def varied() -> dict[str, Plan]:
    """The plan of FT, changed in one thing."""
    smaller = dataclasses.replace(INDEX, names=INDEX.names[:80], presence=SHOWN[:80])
    classes = dataclasses.replace(PROTOCOL, groups=((1, 3), (2, 4), (5, 6)))
    return {
        "training files": plan_of(["ft"], train=dataclasses.replace(INDEX, fingerprint="0" * 16)),
        "test files": plan_of(["ft"], test=dataclasses.replace(INDEX, fingerprint="0" * 16)),
        "image list": plan_of(["ft"], train=smaller),
        "class groups": plan_of(["ft"], protocol=classes),
        "class order": plan_of(
            ["ft"], protocol=dataclasses.replace(PROTOCOL, groups=((2, 1), (3, 4), (5, 6)))
        ),
        "setting": plan_of(["ft"], protocol=dataclasses.replace(PROTOCOL, setting="disjoint")),
        "seed": plan_of(["ft"], seeds=[1]),
        "smoke": plan_of(["ft"], smoke=True),
        "method": plan_of(["ft-frozen"]),
        "data set": plan_of(
            ["ft"], protocol=dataclasses.replace(PROTOCOL, dataset=tensor_dataset(7, "others"))
        ),
    }


def test_everything_that_decides_a_step_gives_it_another_key() -> None:
    keys = {"as it is": plan_of(["ft"]).chains[0].keys}
    keys |= {what: plan.chains[0].keys for what, plan in varied().items()}
    last = {what: chain[-1] for what, chain in keys.items()}
    assert len(set(last.values())) == len(last), last
    same = {what for what, chain in keys.items() if chain[0] == keys["as it is"][0]}
    assert same == {"as it is", "method"}  # FT's step 0 is that of ft-frozen


def test_only_the_classes_so_far_decide_a_step() -> None:
    keys = plan_of(["ft"]).chains[0].keys
    other = plan_of(["ft"], protocol=dataclasses.replace(PROTOCOL, groups=((1, 2), (3, 4), (6, 5))))
    assert [a == b for a, b in zip(keys, other.chains[0].keys, strict=True)] == [True, True, False]


class Knowing(Method):
    """A method that allocates all heads at once."""

    knows_later = True


def test_who_knows_later_classes_has_them_in_its_key(offer: Offers) -> None:
    offer("knowing", Knowing)
    other = dataclasses.replace(PROTOCOL, groups=((1, 2), (3, 4), (6, 5)))
    one, two = (plan_of(["knowing"], protocol=p) for p in (PROTOCOL, other))
    assert all(a != b for a, b in zip(one.chains[0].keys, two.chains[0].keys, strict=True))
    assert one.jobs[one.chains[0].keys[0]].inputs.later == [[3, 4], [5, 6]]
    assert one.jobs[one.chains[0].keys[2]].inputs.later == []


def test_a_version_is_in_the_key_of_the_method_and_of_who_wraps_it(
    offer: Offers, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["ft", "mib", "nest+mib", "plop", "rw"]

    def changed(one: Plan, two: Plan) -> dict[str, list[bool]]:
        pairs = zip(one.chains, two.chains, strict=True)
        each = {a.method: zip(a.keys, b.keys, strict=True) for a, b in pairs}
        return {name.partition("[")[0]: [x != y for x, y in keys] for name, keys in each.items()}

    before = plan_of(names)
    monkeypatch.setattr(METHODS.find("mib").cls, "version", 7)
    after = plan_of(names)
    nowhere, later = [False, False, False], [False, True, True]
    expected = {"ft": nowhere, "mib": later, "nest+mib": later, "plop": nowhere, "rw": nowhere}
    assert changed(before, after) == expected
    monkeypatch.setattr(METHODS.find("ewc").cls.recorders[0], "version", 7)
    expected = {name: [name == "rw"] * 3 for name in names}  # its step 0 records the Fisher information
    assert changed(after, plan_of(names)) == expected


def test_a_lone_change_of_each_field_of_the_inputs_is_another_key() -> None:
    """Whatever a later version adds to the inputs stands in the key, or is neutral."""
    inputs = plan_of(["ewc"]).jobs[plan_of(["ewc"]).chains[0].keys[0]].inputs
    other: Mapping[str, Any] = {
        "format": 99, "kind": "evaluate", "classes": [[9]], "later": [[9]], "images": "x", "smoke": True,
        "seed": 9, "parent": "x", "training": {**inputs.training, "lr": 9}, "evaluation": EvaluationInputs(),
        "data": inputs.data.model_copy(update={"set": "x"}), "records": {"fisher": {"alpha": 0.1}},
        "method": inputs.method.model_copy(update={"settings": {"x": 1}}),
    }  # fmt: skip
    assert set(other) == set(Inputs.model_fields)
    keys = {name: key_of(inputs.model_copy(update={name: value})) for name, value in other.items()}
    keys |= {
        f"data.{name}": key_of(
            inputs.model_copy(update={"data": inputs.data.model_copy(update={name: value})})
        )
        for name, value in {"train": "x", "test": "x", "maps": {"saliency": "x"}}.items()
    }
    keys |= {
        f"evaluation.{k}": key_of(inputs.model_copy(update={"evaluation": EvaluationInputs(**{k: v})}))
        for k, v in {"split": "train", "crop": 16}.items()
    }
    assert len({key_of(inputs), *keys.values()}) == 1 + len(keys)
    assert set(Inputs.NEUTRAL) == {"later", "records", "evaluation"}
    plain = inputs.model_copy(update={"records": {}})
    content = {k: v for k, v in plain.model_dump(mode="json").items() if k not in Inputs.NEUTRAL}
    content["data"] = {k: v for k, v in content["data"].items() if k != "maps"}
    assert content_digest(content) == content_digest(plain.model_dump(mode="json"))


def test_pretrained_weights_count_by_content_and_not_by_name(tmp_path: Path) -> None:
    one, same, other = (tmp_path / f"{name}.pth" for name in ("one", "same", "other"))
    one.write_bytes(b"weights" * 1000)
    shutil.copyfile(one, same)
    other.write_bytes(b"weights" * 999 + b"weightS")  # as long, and alike to the last byte
    keys = [plan_of(["ft"], [f"pretrained={path}"]).chains[0].keys for path in (one, same, other)]
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])
    plan = plan_of(["ft"], [f"pretrained={one}"])
    told = [plan.jobs[key].inputs.training.get("pretrained") for key in plan.chains[0].keys]
    assert told[0] not in (None, str(one))
    assert told[1:] == [None, None]


# ---- the data's own words and files ------------------------------------------------------------------------


def test_what_a_data_set_says_and_what_its_files_hold_decides_every_key(toy: Toy, in_tmp: Path) -> None:
    protocol, said = str(toy()), in_tmp / "toy-set.toml"

    def keys() -> tuple[str, ...]:
        return make_plan([protocol], ["ft"], overrides=["batch_size=4"]).chains[0].keys

    seen = {keys()}
    text, image, names = said.read_text(), in_tmp / "toy/images/train000.png", in_tmp / "toy/train.txt"
    for changed in (
        text.replace('"c1"', '"cat"'),
        f'background = "unlabelled"\n{text}',
        f"mask_ids = [0, 2, 1, 3, 4]\n{text}",
    ):
        said.write_text(changed)
        now = keys()
        assert all(not set(now) & set(before) for before in seen), changed
        seen.add(now)
    said.write_text(text)
    assert keys() in seen
    photograph = bytearray(image.read_bytes())
    photograph[60] ^= 1  # as long as before
    image.write_bytes(bytes(photograph))
    now = keys()
    assert all(not set(now) & set(before) for before in seen)
    seen.add(now)
    names.write_text("\n".join(names.read_text().split()[:-1]) + "\n")
    assert all(not set(keys()) & set(before) for before in seen)


# ---- chains, and on disk -----------------------------------------------------------------------------------


def test_a_key_is_its_inputs_and_its_parents(tmp_path: Path) -> None:
    plan, store = plan_of(every_method(), seeds=[0, 3]), Store(tmp_path / "r")
    for key, job in plan.jobs.items():
        assert key_of(job.inputs) == key
        store.open_work(plan.record(key))
        read = store.record(key)
        assert read.inputs == job.inputs
        assert key_of(read.inputs) == key
        through = parse_record(
            json.loads(json.dumps(read.model_dump(mode="json") | {"schema": SCHEMA})), Record, "here"
        )
        assert key_of(through.inputs) == key
    for chain in plan.chains:
        parents = [plan.jobs[key].parent for key in chain.keys]
        assert parents == [None, *chain.keys[:-1]]
    seeds = {(c.method, c.seed): c.keys for c in plan.chains}
    assert all(not set(seeds[m, 0]) & set(seeds[m, 3]) for m, _ in seeds)


def test_a_first_setting_without_its_own_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Config: first_wait: no field 'wait'"):

        class Config(Settings):
            first_wait: First[int] = Field(0, ge=0)

    with pytest.raises(UserError, match="unknown setting 'wait'"):
        plan_of(["ft"], ["wait=1"])


def test_lengths_play_no_part_in_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """They follow from config and counts: what they say more must be in a version."""
    keys = plan_of(["ft"]).chains[0].keys
    others = classmethod(lambda *_: {"training": Length(7, 31)})
    monkeypatch.setattr(METHODS.find("ft").cls, "lengths", others)
    assert plan_of(["ft"]).chains[0].keys == keys
