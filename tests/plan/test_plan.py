from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from artifacts import TINY

from bench.data.index import ClassIndex
from bench.errors import UserError
from bench.method.registry import method
from bench.method.resolve import resolve
from bench.plan.keys import key_of
from bench.plan.make import make_plan
from bench.plan.plan import Plan
from bench.protocol.file import load

Toy = Callable[..., Path]


def keys(plan: Plan, method: str, protocol: str | None = None, seed: int = 0) -> tuple[str, ...]:
    return next(
        c.keys
        for c in plan.chains
        if c.method.partition("[")[0] == method and c.seed == seed and protocol in (None, c.protocol.name)
    )


def test_methods_with_the_same_first_step_share_its_job(toy: Toy) -> None:
    plan = make_plan([str(toy())], ["ft", "lwf", "mib", "plop", "ewc", "ssul"], overrides=["batch_size=4"])
    first = {name: keys(plan, name)[0] for name in ("ft", "lwf", "mib", "plop", "ewc", "ssul")}
    assert len({first[name] for name in ("ft", "lwf", "mib", "plop")}) == 1
    assert len({first[name] for name in ("ft", "ewc", "ssul")}) == 3
    assert plan.siblings(first["ft"]) == [first["ft"], first["ewc"]]  # one training: EWC's is recorded
    assert len({keys(plan, name)[1] for name in first}) == len(first)
    assert len(plan.jobs) == 3 + 2 * len(first)


def test_protocols_with_the_same_first_classes_share_step_0(toy: Toy) -> None:
    one = toy(n_classes=4, first=2, then=1)
    two = one.with_name("toy-2-2.toml")
    two.write_text(one.read_text().replace("then = 1", "then = 2"))
    plan = make_plan([str(one), str(two)], ["ft", "joint"], overrides=["batch_size=4"])
    assert keys(plan, "ft", "toy-2-1")[0] == keys(plan, "ft", "toy-2-2")[0]
    assert keys(plan, "ft", "toy-2-1")[1] != keys(plan, "ft", "toy-2-2")[1]
    assert keys(plan, "joint", "toy-2-1") == keys(plan, "joint", "toy-2-2")
    assert len(keys(plan, "joint", "toy-2-1")) == 1


def test_a_hyper_parameter_changes_the_jobs_below_it_and_no_other(toy: Toy) -> None:
    protocol = str(toy())

    def chain(method: str, *overrides: str) -> tuple[str, ...]:
        return make_plan([protocol], [method], overrides=["batch_size=4", *overrides]).chains[0].keys

    base = chain("mib")
    assert [a == b for a, b in zip(base, chain("mib", "distillation=3"), strict=True)] == [True, False, False]
    assert [a == b for a, b in zip(base, chain("mib", "lr=0.5"), strict=True)] == [True, False, False]
    assert [a == b for a, b in zip(base, chain("mib", "first_epochs=3"), strict=True)] == [
        False,
        False,
        False,
    ]
    assert [
        a == b
        for a, b in zip(
            chain("ssul", "saliency=all"), chain("ssul", "saliency=all", "threshold=0.5"), strict=True
        )
    ] == [
        True,
        False,
        False,
    ]
    assert chain("rw", "walk_interval=3")[0] != chain("rw")[0]  # step 0 records with this interval
    assert chain("rw", "importance=3")[0] == chain("rw")[0]
    assert len({chain(name)[0] for name in ("ft", "rw", "ewc", "pi")}) == 4


def test_seeds_settings_and_smoke_are_part_of_the_key(toy: Toy) -> None:
    protocol = str(toy())
    plain = make_plan([protocol], ["ft"], seeds=[0, 1], overrides=["batch_size=4"])
    smoke = make_plan([protocol], ["ft"], overrides=["batch_size=4"], smoke=True)
    everything = [*keys(plain, "ft"), *keys(plain, "ft", seed=1), *keys(smoke, "ft")]
    assert len(set(everything)) == 9


def test_other_photographs_with_the_same_masks_are_another_data_set(toy: Toy, in_tmp: Path) -> None:
    protocol = str(toy())
    before = make_plan([protocol], ["ft"], overrides=["batch_size=4"])
    image = in_tmp / "toy/images/train000.png"
    image.write_bytes(image.read_bytes() + b"more")
    for index in in_tmp.rglob("class-index/*.txt"):
        index.unlink()
    after = make_plan([protocol], ["ft"], overrides=["batch_size=4"])
    assert not set(before.jobs) & set(after.jobs)


def test_joint_sees_the_images_of_its_own_setting(toy: Toy, in_tmp: Path) -> None:
    one = toy(first=2, then=1)
    two = in_tmp / "other.toml"
    two.write_text(one.read_text() + 'setting = "disjoint"\n')
    alone = [
        make_plan([str(path)], ["joint"], overrides=["batch_size=4"]).chains[0].keys for path in (one, two)
    ]
    assert [
        chain.keys for chain in make_plan([str(one), str(two)], ["joint"], overrides=["batch_size=4"]).chains
    ] == alone


@pytest.mark.parametrize("split", ["train", "test"])
def test_as_many_other_images_are_another_step(split: str) -> None:
    """Of a disjoint protocol, whose lists depend on the label rule: MBS validates on them too."""
    first, second = 1 << 1, 1 << 1 | 1 << 2
    protocol = replace(TINY, setting="disjoint")
    keys = []
    for swapped in (False, True):
        shown = [first, second] * 30
        lists = {
            name: ClassIndex(
                tuple(f"i{i}" for i in range(60)),
                tuple(reversed(shown)) if swapped and name == split else tuple(shown),
                "same",
            )
            for name in ("train", "test")
        }
        plan = make_plan([protocol], ["ft"], overrides=["label_rule=mbs"], indexes={"shapes": lists})
        keys.append(plan.chains[0].keys[0])
    assert keys[0] != keys[1]


def test_a_label_of_many_settings_is_still_a_folder_name() -> None:
    labels = [
        resolve(method("ft"), load("shapes-6-2"), "small", [("pretrained", f"{'w' * 300}{end}")]).label
        for end in "ab"
    ]
    assert labels[0] != labels[1]
    assert all(len(label) < 160 for label in labels)


def test_saliency_maps_are_part_of_the_key_of_jobs_that_read_them(toy: Toy, in_tmp: Path) -> None:
    protocol = str(toy())

    def first(method: str) -> str:
        return make_plan([protocol], [method], overrides=["batch_size=4"]).chains[0].keys[0]

    with_maps, without = first("ssul"), first("ft")
    path = in_tmp / "toy/saliency/train003.png"
    path.write_bytes(path.read_bytes() + b"more")
    assert first("ssul") != with_maps
    assert first("ft") == without
    path.unlink()
    with pytest.raises(
        UserError, match=r"1 of 24 saliency maps are missing, the first is .*train003\.png; ssul needs them"
    ):
        first("ssul")
    make_plan([protocol], ["ssul"], overrides=["batch_size=4", "saliency=all"])


def test_phases_and_memories_count_as_work(toy: Toy) -> None:
    plan = make_plan(
        [str(toy(then=2))],
        ["nest+mib", "dkd@m"],
        overrides=["batch_size=4", "epochs=3", "nest+mib.pretuning_epochs=2"],
    )
    later = {job.method: job for job in plan.jobs.values() if job.step}
    assert later["nest+mib"].iterations == later["nest+mib"].images // 4 * (3 + 2)
    memory = later["dkd@m"].config.memory_size  # type: ignore[attr-defined]
    assert later["dkd@m"].iterations == (later["dkd@m"].images + memory) // 4 * 3


def test_every_job_comes_after_its_parent_and_counts_its_work(toy: Toy) -> None:
    plan = make_plan(
        [str(toy(images=24))],
        ["ft", "mib", "joint"],
        overrides=["batch_size=4", "epochs=3", "first_epochs=5"],
    )
    seen: set[str] = set()
    for key, job in plan.jobs.items():
        assert job.parent is None or job.parent in seen
        assert key == key_of(job.inputs)
        assert job.iterations == job.images // 4 * (5 if job.step == 0 else 3)
        seen.add(key)


def test_a_step_with_fewer_images_than_a_batch_is_refused(toy: Toy) -> None:
    with pytest.raises(
        UserError, match=r"toy-2-1, step 1: \d+ training images are fewer than batch_size = 16"
    ):
        make_plan([str(toy(images=40))], ["ft"])


def test_results_of_changed_settings_have_a_name_of_their_own(toy: Toy) -> None:
    plan = make_plan([str(toy())], ["ft", "mib"], overrides=["batch_size=4", "mib.distillation=3"])
    assert {c.method for c in plan.chains} == {"ft[batch_size=4]", "mib[batch_size=4,distillation=3]"}


def test_a_setting_that_decides_nothing_makes_no_other_row(toy: Toy) -> None:
    protocol = str(toy())
    plain, how = (
        make_plan([protocol], ["ft"], overrides=["batch_size=4", *more])
        for more in ([], ["norm=inplace", "ft.checkpoint_minutes=0"])
    )
    assert [c.method for c in how.chains] == [c.method for c in plain.chains] == ["ft[batch_size=4]"]
    assert list(how.jobs) == list(plain.jobs)


def test_missing_weights_of_a_recipe_are_said_loudly_and_of_a_user_refused(toy: Toy) -> None:
    protocol = str(toy())
    with pytest.raises(UserError, match="network = 'small' has no torchvision weights"):
        make_plan([protocol], ["ft"], overrides=["pretrained=imagenet", "batch_size=4"])
    with pytest.raises(UserError, match=r"--set pretrained=nowhere\.pth: no such file"):
        make_plan([protocol], ["ft"], overrides=["pretrained=nowhere.pth", "batch_size=4"])


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (["mibb"], "unknown method 'mibb'; did you mean 'mib'"),
        (["mib@w10"], "unknown variant 'w10'; did you mean 'w100'"),
        (["mib+ft"], "does not wrap another method"),
        ([], "--methods: empty"),
    ],
)
def test_unknown_methods(toy: Toy, methods: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan([str(toy())], methods, overrides=["batch_size=4"])
    assert words in str(caught.value)
