"""The published recipes, value by value, against what the authors' parsers made of their own scripts.

Source: docs of the methods' specifications: mib-family section 7, plop section 6, ssul section 7, mbs
section 3, eir sections 3 and 7, nest section 6, ewf section 3, awt section 4,
dft-star section 2, reminder section 4, ucd section 2, star section 5. Each row: method, task, then
(step 0, later) of what is named.
"""

from __future__ import annotations

import pytest

from bench.method.registry import method
from bench.method.resolve import resolve
from bench.plan.make import footnotes_of
from bench.protocol.file import load

VOC = ("voc-19-1", "voc-15-5", "voc-15-1", "voc-10-1", "voc-5-3")
ADE = ("ade-100-50", "ade-100-10", "ade-100-5", "ade-50-50")
MIB_FAMILY = ("ft", "joint", "lwf", "lwf-mc", "ilt", "ewc", "pi", "rw", "mib")

Pair = tuple[float, float]
COMMON = {"crop": (512, 512), "momentum": (0.9, 0.9), "weight_decay": (1e-4, 1e-4), "power": (0.9, 0.9)}


def row(
    names: tuple[str, ...],
    tasks: tuple[str, ...],
    batch: int,
    lr: Pair,
    epochs: Pair,
    rule: str,
    precision: str,
    **more: object,
) -> list[tuple[str, str, dict[str, object]]]:
    """Expected (step 0, later) values of some methods on some tasks."""
    values = {
        **COMMON,
        "batch_size": (batch, batch),
        "lr": lr,
        "epochs": epochs,
        "label_rule": (rule, rule),
        "precision": (precision, precision),
        **more,
    }
    return [(name, task, values) for name in names for task in tasks]


def only(value: object) -> tuple[object, object]:
    """The same at step 0 and later."""
    return value, value


FP32_TEST = {"test_precision": only("fp32")}
SSUL = {"crop": only(513), "augmentation": only("scale-crop"), "selection": only("best-on-test"), **FP32_TEST}
DKD = {"body_lr": only(0.1), **FP32_TEST}
STAR = {
    "pos_weight": only(4.0), "distillation": only(5.0), "separation": only(0.05), "newest_lr": only(10.0),
    **DKD,
}  # fmt: skip
BARM = {
    **SSUL, "selection": ("best-on-test", "last"), "min_lr": only(1e-6), "schedule": only("poly"),
    "threshold": only(0.7), "residual_background": only(5.0), "features": only(4.0), "scores": only(1.0),
    "residual_new": only(1.0), "half_of_the_data": only(True), "ear_statistics": only("fresh"),
}  # fmt: skip
REMINDER_VOC: dict[str, object] = {"pod": only(0.01), "pod_logits": only(0.0005), "delta": only(0.0)}
REMINDER_ADE: dict[str, object] = {"pod": only(0.001), "pod_logits": only(0.00001), "delta": only(1.0)}
PARTS = {"distillation": only(5.0), "positive": only(5.0), "negative": only(5.0), "auxiliary": only(1.0)}

EXPECTED = [
    *row(MIB_FAMILY, VOC, 24, (0.01, 0.001), (30, 30), "mib", "fp32"),
    *row(MIB_FAMILY, ADE, 24, (0.01, 0.001), (60, 60), "mib", "fp32"),
    *row(
        ("plop",),
        tuple(t for t in VOC if t != "voc-10-1"),
        24,
        (0.01, 0.001),
        (30, 30),
        "plop",
        "fp16",
        pod=only(0.01),
        pod_logits=only(0.0005),
        base_threshold=only(0.001),
        scales=only((1, 2, 4)),
    ),
    *row(
        ("plop",),
        ("voc-10-1",),
        24,
        (0.01, 0.001),
        (30, 10),
        "plop",
        "fp16",
        pod=only(0.01),
        pod_logits=only(0.0005),
    ),
    *row(
        ("plop",), ADE, 24, (0.01, 0.001), (60, 60), "plop", "fp16", pod=only(0.001), pod_logits=only(0.00001)
    ),
    *row(
        ("ewc@plop", "pi@plop"),
        ("voc-15-1",),
        24,
        (0.01, 0.001),
        (30, 30),
        "plop",
        "fp16",
        importance=only(100.0),
    ),
    *row(
        ("mib@preset",), ("voc-15-1",), 24, (0.01, 0.001), (30, 30), "plop", "fp16", distillation=only(10.0)
    ),
    *row(
        ("mib@preset",), ("voc-10-1",), 24, (0.01, 0.001), (30, 10), "plop", "fp16", distillation=only(10.0)
    ),
    *row(("mib",), ("voc-15-1",), 24, (0.01, 0.001), (30, 30), "mib", "fp32", distillation=only(100.0)),
    *row(
        ("mib",),
        ("voc-15-5", "voc-19-1"),
        24,
        (0.01, 0.001),
        (30, 30),
        "mib",
        "fp32",
        distillation=only(10.0),
    ),
    *row(("lwf", "ilt"), ("voc-15-1",), 24, (0.01, 0.001), (30, 30), "mib", "fp32", distillation=only(100.0)),
    *row(("lwf-mc",), ("voc-15-1",), 24, (0.01, 0.001), (30, 30), "mib", "fp32", distillation=only(10.0)),
    *row(("ewc", "pi"), ("voc-15-1",), 24, (0.01, 0.001), (30, 30), "mib", "fp32", importance=only(500.0)),
    *row(("rw",), ("voc-15-1",), 24, (0.01, 0.001), (30, 30), "mib", "fp32", importance=only(100.0)),
    *row(
        ("ssul", "ssul-m"),
        VOC,
        32,
        (0.01, 0.01),
        (50, 50),
        "ssul",
        "fp16",
        schedule=only("poly"),
        min_lr=only(1e-6),
        body_lr=(0.1, 1.0),
        threshold=only(0.7),
        saliency=only("files"),
        **SSUL,
    ),
    *row(
        ("ssul", "ssul-m"),
        ADE,
        24,
        (0.01, 0.05),
        (100, 100),
        "ssul",
        "fp16",
        schedule=only("warm-poly"),
        warmup=only(0.1),
        warmup_rounding=only("down"),
        saliency=only("all"),
        **SSUL,
    ),
    *row(
        ("ssul-m",), ("voc-15-1",), 32, (0.01, 0.01), (50, 50), "ssul", "fp16", memory_size=only(100), **SSUL
    ),
    *row(
        ("ssul-m",),
        ("ade-100-50",),
        24,
        (0.01, 0.05),
        (100, 100),
        "ssul",
        "fp16",
        memory_size=only(300),
        **SSUL,
    ),
    *row(
        ("mbs",),
        ("voc-15-1",),
        16,
        (0.001, 0.0001),
        (32, 32),
        "mbs",
        "fp16",
        schedule=only("constant"),
        weight_decay=only(1e-5),
        output_distillation=only(25.0),
        selection=only("best-on-test"),
        **FP32_TEST,
    ),
    *row(
        ("mbs",),
        ("ade-100-50",),
        8,
        (0.001, 0.0005),
        (64, 64),
        "mbs",
        "fp16",
        schedule=only("constant"),
        weight_decay=only(1e-5),
        output_distillation=only(50.0),
        selection=only("best-on-test"),
        **FP32_TEST,
    ),
    *row(
        ("dkd", "dkd@m"),
        VOC,
        32,
        (0.01, 0.001),
        (60, 60),
        "eir",
        "fp16",
        pos_weight=(2.0, 1.0),
        schedule=only("poly"),
        **DKD,
        **PARTS,
    ),
    *row(
        ("dkd", "dkd@m"),
        ADE,
        24,
        (0.025, 0.0025),
        (100, 100),
        "eir",
        "fp16",
        pos_weight=only(35.0),
        warmup=only(0.2),
        schedule=only("warm-poly"),
        warmup_rounding=only("none"),
        **DKD,
        **PARTS,
    ),
    *row(("dkd@m",), ("voc-15-1",), 32, (0.01, 0.001), (60, 60), "eir", "fp16", memory_size=only(100)),
    *row(("dkd@m",), ("ade-100-50",), 24, (0.025, 0.0025), (100, 100), "eir", "fp16", memory_size=only(300)),
    *row(("star", "star@m"), VOC, 24, (0.01, 0.001), (60, 60), "eir", "fp16", schedule=only("poly"), **STAR),
    *row(
        ("star", "star@m"),
        ADE[:2] + ADE[3:],
        24,
        (0.025, 0.0025),
        (100, 100),
        "eir",
        "fp16",
        schedule=only("warm-poly"),
        warmup=only(0.2),
        warmup_rounding=only("none"),
        **{**STAR, "pos_weight": only(30.0)},
    ),
    *row(("star",), ("voc-15-1",), 24, (0.01, 0.001), (60, 60), "eir", "fp16", memory_size=only(0)),
    *row(("star@m",), ("voc-15-1",), 24, (0.01, 0.001), (60, 60), "eir", "fp16", memory_size=only(50)),
    *row(
        ("eir",),
        ("voc-15-5", "voc-15-1"),
        32,
        (0.01, 0.001),
        (60, 60),
        "eir",
        "fp16",
        distillation=only(5.0),
        **DKD,
    ),
    *row(
        ("eir",),
        ("voc-19-1", "voc-10-1", "voc-5-3"),
        24,
        (0.01, 0.001),
        (60, 60),
        "eir",
        "fp16",
        threshold=only(0.7),
        **DKD,
    ),
    *row(
        ("nest+mib", "nest+plop"),
        ("voc-15-1",),
        24,
        (0.02, 0.001),
        (30, 30),
        "plop",
        "fp16",
        pretuning_epochs=only(5),
        pretuning_lr_scale=only(1.0),
    ),
    *row(
        ("nest+mib", "nest+plop"),
        ("voc-10-1",),
        24,
        (0.02, 0.001),
        (30, 10),
        "plop",
        "fp16",
        pretuning_epochs=only(5),
    ),
    *row(
        ("nest+mib", "nest+plop"),
        ("ade-100-5",),
        24,
        (0.02, 0.001),
        (60, 60),
        "plop",
        "fp16",
        pretuning_epochs=only(15),
        pretuning_lr_scale=only(500.0),
    ),
    *row(
        ("nest+mib",),
        ("voc-15-1",),
        24,
        (0.02, 0.001),
        (30, 30),
        "plop",
        "fp16",
        distillation=only(10.0),
        freeze_old_classifier=only(False),
    ),
    *row(
        ("nest+plop",),
        ("voc-15-1",),
        24,
        (0.02, 0.001),
        (30, 30),
        "plop",
        "fp16",
        freeze_old_classifier=only(True),
    ),
    *row(
        ("nest+plop",),
        ("ade-100-5",),
        24,
        (0.02, 0.001),
        (60, 60),
        "plop",
        "fp16",
        freeze_old_classifier=only(False),
    ),
    *row(
        ("ewf+mib",),
        ("voc-19-1", "voc-15-5", "voc-15-1", "voc-10-1", "voc-5-3"),
        24,
        (0.01, 0.001),
        (30, 30),
        "plop",
        "fp16",
        distillation=only(10.0),
        fused_share=only(1.0),
    ),
    *row(
        ("ewf+plop",),
        VOC,
        24,
        (0.01, 0.001),
        (30, 30),
        "plop",
        "fp16",
        pod=only(0.01),
        pod_logits=only(0.0005),
        base_threshold=only(0.001),
        histogram_limit=only(2**24),
    ),
    *row(("ewf+mib",), ("ade-100-50",), 24, (0.01, 0.001), (60, 60), "plop", "fp16", distillation=only(10.0)),
    *row(
        ("ewf+mib",),
        ("ade-100-10", "ade-100-5"),
        24,
        (0.01, 0.001),
        (60, 60),
        "plop",
        "fp16",
        distillation=only(100.0),
    ),
    *row(
        ("awt+mib",),
        ("voc-15-5", "voc-15-1", "voc-10-1", "voc-5-3"),
        24,
        (0.02, 0.001),
        (30, 30),
        "plop",
        "fp16",
        distillation=only(10.0),
        percent=only(25.0),
        attribution=only("union"),
        attribution_images=only(None),
    ),
    *row(
        ("awt+mib",),
        ("ade-100-50", "ade-100-10"),
        24,
        (0.02, 0.001),
        (60, 60),
        "plop",
        "fp16",
        distillation=only(10.0),
        attribution=only("accumulated"),
        attribution_images=only(2000),
    ),
    *row(
        ("awt+mib",),
        ("ade-50-50",),
        24,
        (0.02, 0.001),
        (60, 60),
        "plop",
        "fp16",
        attribution=only("accumulated"),
        attribution_images=only(5000),
    ),
    *row(
        ("awt+mib", "awt@corrected+mib"),
        ("ade-100-5",),
        24,
        (0.02, 0.001),
        (60, 60),
        "plop",
        "fp16",
        attribution=only("union"),
        attribution_images=only(2000),
    ),
    *row(
        ("awt@corrected+mib",),
        ("ade-100-50",),
        24,
        (0.02, 0.001),
        (60, 60),
        "plop",
        "fp16",
        attribution=only("per-class"),
    ),
    *row(
        ("barm",),
        ("voc-19-1", "voc-15-5", "voc-15-1", "voc-10-1", "voc-5-3"),
        8,
        (0.01, 0.001),
        (50, 20),
        "ssul",
        "fp16",
        **BARM,
        batch_size=(16, 8),
        body_lr=only(0.1),
        aspp_lr=only(1.0),
        old_lr=only(0.1),
    ),
    *(
        (name, task, dict(values, body_lr=only(1.0)))
        for task, lr, other in (
            ("voc-10-1", 0.0005, 0.0005),
            ("voc-15-1", 0.0005, 0.0005),
            ("voc-15-5", 0.02, 0.0005),
            ("voc-19-1", 0.005, 0.005),
            ("voc-5-3", 0.02, 0.0005),
            ("ade-100-5", 0.05, 0.05),
            ("ade-100-10", 0.1, 0.1),
            ("ade-100-50", 0.1, 0.1),
            ("ade-50-50", 0.1, 0.1),
        )
        for name, rate in (("dft", lr), ("dft@swin", other))
        for _, _, values in row(
            (name,), (task,), 24, (0.02, rate), (30, 60 if task.startswith("ade") else 30), "plop", "fp16"
        )
    ),
    *(
        (
            name,
            task,
            values | {"batch_size": batch, "similarity": only(0.5), "temperature": only(3.0)} | more,
        )
        for tasks, batch, rates, epochs, more in (
            (("voc-15-1",), only(16), (0.01, 0.001), (30, 30), REMINDER_VOC),
            (("voc-15-5", "voc-19-1", "voc-10-1"), only(32), (0.01, 0.001), (30, 30), REMINDER_VOC),
            (("ade-100-50",), (12, 10), (0.01, 0.0008), (60, 70), REMINDER_ADE),
            (("ade-100-10", "ade-100-5", "ade-50-50"), only(10), (0.01, 0.001), (60, 70), REMINDER_ADE),
        )
        for name, task, values in row(("reminder",), tasks, 0, rates, epochs, "plop", "fp16")
    ),
    *row(
        ("ucd",),
        ("voc-15-1", "voc-19-1"),
        24,
        (0.01, 0.001),
        (30, 30),
        "mib",
        "fp32",
        distillation=only(10.0),
        contrast=only(0.01),
        temperature=only(0.07),
        pairing=only("as-published"),
    ),
    *row(
        ("ucd@corrected",),
        ADE,
        24,
        (0.01, 0.001),
        (60, 60),
        "mib",
        "fp32",
        distillation=only(10.0),
        contrast=only(0.01),
        temperature=only(0.07),
        pairing=only("corrected"),
    ),
    *row(
        ("barm",),
        ADE,
        4,
        (0.01, 0.01),
        (60, 100),
        "ssul",
        "fp16",
        **BARM,
        batch_size=(8, 4),
        body_lr=(0.1, 0.01),
        aspp_lr=only(0.1),
        old_lr=only(0.01),
    ),
    *row(
        ("barm@corrected",),
        ("voc-15-1",),
        16,
        (0.01, 0.001),
        (50, 20),
        "ssul",
        "fp16",
        **{**BARM, "half_of_the_data": only(False), "ear_statistics": only("copied")},
    ),
]


@pytest.mark.parametrize(
    ("name", "task", "values"), EXPECTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_values_are_those_that_the_authors_ran(
    name: str, task: str, values: dict[str, tuple[object, object]]
) -> None:
    config = resolve(method(name), load(task), "published").config
    for step in (0, 1):
        folded = config.at(step)
        assert {key: getattr(folded, key) for key in values} == {
            key: pair[step] for key, pair in values.items()
        }


def notes(name: str, task: str, setting: str | None = None) -> list[str]:
    spec, protocol = method(name), load(task, setting)
    return footnotes_of(spec, resolve(spec, protocol, "published"), protocol)


@pytest.mark.parametrize(
    ("name", "task", "source"),
    [
        ("mib", "voc-10-1", "mib.toml [published], data set voc"),
        ("ft", "voc-2-1", "mib.toml [published], data set voc"),
        ("dkd", "voc-2-1", "dkd.toml [published], data set voc"),
        ("mbs", "voc-10-1", "mbs.toml [published], data set voc"),
        ("eir", "ade-100-50", "eir.toml [published], data set ade"),
        ("nest+plop", "voc-19-1", "nest.toml [published]"),
        ("nest+lwf", "voc-15-1", "nest.toml [published]"),
        ("ewf+mib", "voc-15-5", "ewf.toml [on.mib.published]"),
        ("ewf+plop", "ade-100-50", "ewf.toml [published], data set ade"),
        ("ewf+nest+mib", "voc-15-1", "ewf.toml [published], data set voc"),
        ("awt+mib", "voc-19-1", "awt.toml [on.mib.published]"),
        ("awt+plop", "voc-15-1", "awt.toml [published], data set voc"),
    ],
)
def test_what_no_author_ran_says_where_its_values_come_from(name: str, task: str, source: str) -> None:
    (note,) = [note for note in notes(name, task) if note.startswith("extrapolated")]
    assert note.startswith(f"extrapolated from {source}: its authors ran ")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("mib", "voc-15-1"),
        ("plop", "voc-10-1"),
        ("ssul", "voc-15-1-b"),
        ("mbs", "ade-100-50"),
        ("nest+mib", "ade-100-5"),
        ("ewf+mib", "ade-100-10"),
        ("ewf+plop", "voc-10-1"),
        ("awt+mib", "ade-50-50"),
    ],
)
def test_what_the_authors_ran_says_nothing(name: str, task: str) -> None:
    assert not [note for note in notes(name, task) if note.startswith("extrapolated")]


def test_nothing_is_extrapolated_in_tracks_that_are_nobodys() -> None:
    spec, protocol = method("mib"), load("voc-10-1")
    assert not resolve(spec, protocol, "controlled").notes


def test_a_row_outside_of_the_authors_partition_says_so() -> None:
    said = "its authors trained in the setting partition, this row is overlapped"
    assert said in notes("mib", "ade-100-50")
    assert said not in notes("mib", "ade-100-50", "partition")
    assert said not in notes("plop", "ade-100-50")


def test_void_is_spoken_of_only_where_there_is_void() -> None:
    said = "void pixels are trained as background"
    assert said in notes("mib", "voc-15-1")
    assert said not in notes("mib", "ade-100-50")


def test_what_only_a_later_repository_ran_is_told() -> None:
    assert [n for n in notes("nest+plop", "voc-19-1") if n.startswith("a later repository of other authors")]
    assert not [
        n for n in notes("nest+mib", "voc-19-1") if n.startswith("a later repository of other authors")
    ]


def test_the_memory_of_dkd_m_is_not_the_released_codes() -> None:
    assert [n for n in notes("dkd@m", "voc-15-1") if "weights are not loaded yet" in n]
    assert not [n for n in notes("dkd", "voc-15-1") if "weights are not loaded yet" in n]
