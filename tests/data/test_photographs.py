"""What trains and what is scored on the photographs of CamVid, against a plain reading by PIL and numpy that
is written here."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bench.data.index import class_indexes
from bench.data.locate import locate
from bench.method import Method, Settings
from bench.method.step_data import StepData
from bench.protocol.file import load
from bench.seeds import mix
from bench.train.evaluate import evaluate
from bench.train.trainer import Trainer

STEP = 2
"""Sky to tree, then sign, then fence (id 8, channel 8); car, pedestrian and bicyclist are still to come."""
ID_OF_VALUE = {**{value: value + 1 for value in range(11)}, 11: 255}
"""Masks count from 0 without background; 11 is void. Source: the data set's own description."""
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class ByBrightness(Method):
    """A method whose predictions follow from the colours of an image alone."""

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        assert output.shape[-2:] == size
        return (output.sum(1) * 255).round().long() % self.step.n_classes


class Undone(nn.Module):
    """A network that undoes the normalisation."""

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        return images.double() * std + mean


def opened(shared: Path, size: int, **settings: Any) -> tuple[Trainer, StepData]:
    """A trainer and the data of a step, as a job has them."""
    protocol, root = load("camvid-6-1"), shared / "data/camvid"
    config = Settings(batch_size=size, **settings)
    files, index = locate(protocol.dataset, root), class_indexes(protocol.dataset, root)
    data = StepData(protocol, protocol.step(STEP), files, index, config, seed=3)
    method = ByBrightness(config)
    method.step, method.data, method.network = data.step, data, Undone()
    trainer = Trainer(method, 3, torch.device("cpu"))
    data.prepare = trainer.batch
    return trainer, data


def listed(shared: Path, split: str) -> list[str]:
    return (shared / f"data/camvid/{split}.txt").read_text().split()


def read(shared: Path, name: str) -> tuple[Image.Image, Image.Image]:
    """Image and mask, with the data set's class ids, of one name."""
    folder = shared / "data/camvid"
    values = np.asarray(Image.open(folder / f"annotations/{name}.png"))
    ids = np.vectorize(ID_OF_VALUE.__getitem__, otypes=[np.uint8])(values)
    return Image.open(folder / f"images/{name}.jpg").convert("RGB"), Image.fromarray(ids)


def scored(shared: Path, name: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and ids as they are tested: the shorter side resized to `side`, then the central square."""
    image, ids = read(shared, name)
    width, height = image.size
    assert width > height
    wide = int(side * width / height)
    left = round((wide - side) / 2)
    box = (left, 0, left + side, side)
    large = image.resize((wide, side), Image.Resampling.BILINEAR).crop(box)
    return np.asarray(large), np.asarray(ids.resize((wide, side), Image.Resampling.NEAREST).crop(box))


@pytest.mark.parametrize(("side", "size"), [(96, 4), (65, 7)])
def test_counts_of_test_photographs(shared: Path, side: int, size: int) -> None:
    trainer, data = opened(shared, size, crop=side)
    names, seen = listed(shared, "test"), [0, *range(1, 9)]
    assert data.step.seen == tuple(seen)
    positions = list(range(0, len(names), 17))
    counts = evaluate(trainer, data, data.test_images(positions), positions)
    assert counts.images == tuple(names[p] for p in positions)
    assert counts.rows == tuple(range(12))
    for row, p in enumerate(positions):
        image, ids = scored(shared, names[p], side)
        predicted = image.sum(2, dtype=int) % len(seen)
        expected = np.zeros((12, len(seen)), int)
        kept = ids != 255
        np.add.at(expected, (ids[kept], predicted[kept]), 1)
        chosen = np.arange(len(positions)) == row
        assert (counts.total(chosen) == expected).all()
        whole = set(np.unique(np.asarray(read(shared, names[p])[1])).tolist())
        assert counts.shows_seen[row] == bool(whole & set(seen[1:]))


def drawn_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a training crop. Source: spec/protocol.md section 4."""
    for _ in range(10):
        area = rng.uniform(0.5, 2.0) * width * height
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            return left, top, left + w, top + h
    assert (width, height) == (480, 360)  # whose aspect is just allowed: the whole image
    return 0, 0, width, height


@pytest.mark.parametrize("epoch", [0, 1])
def test_training_photographs_with_their_labels(shared: Path, epoch: int) -> None:
    """Which images, in which order, cut how, labelled how, normalised how: two batches of a later step."""
    trainer, data = opened(shared, 5, crop=64, augmentation="random-resized-crop", label_rule="plop")
    fences = [n for n in listed(shared, "train") if 8 in np.asarray(read(shared, n)[1])]
    assert 0 < len(fences) < 367
    assert data.names(STEP) == fences
    order = list(range(len(fences)))
    random.Random(mix(mix(3, STEP, "train"), "order", epoch)).shuffle(order)
    for number, raw in zip(range(2), data.loader(data.train, epoch), strict=False):
        batch = trainer.batch(raw)
        chosen = order[5 * number : 5 * number + 5]
        assert raw["index"].tolist() == chosen
        for k, i in enumerate(chosen):
            rng = random.Random(mix(mix(3, STEP, "train"), epoch, number, k, i))
            image, ids = read(shared, fences[i])
            box = drawn_box(*image.size, rng)
            image = image.crop(box).resize((64, 64), Image.Resampling.BILINEAR)
            ids = ids.crop(box).resize((64, 64), Image.Resampling.NEAREST)
            pixels, found = np.asarray(image), np.asarray(ids)
            if rng.random() < 0.5:
                pixels, found = pixels[:, ::-1], found[:, ::-1]
            labels = np.select([found == 8, found == 255], [8, 255], 0)
            assert (batch.labels[k].numpy() == labels).all()
            normal = ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)
            np.testing.assert_allclose(batch.images[k].numpy(), normal, atol=1e-5)
            assert batch.extra["classes"][k].nonzero().flatten().tolist() == [8]
    data.close()


def shows(shared: Path, name: str) -> set[int]:
    """Ids in a whole mask."""
    return set(np.unique(np.asarray(read(shared, name)[1])).tolist())


def test_step_lists_of_the_photographs(shared: Path) -> None:
    """Every step's training and test images, from the masks themselves."""
    _, data = opened(shared, 4, crop=64)
    shown = {
        split: {name: shows(shared, name) for name in listed(shared, split)[::5]}
        for split in ("train", "test")
    }
    for index in range(6):
        new = set(range(1, 7)) if index == 0 else {6 + index}
        learned, names = set(data.names(index)), data.index["test"].names
        tested = {names[p] for p in data.protocol.test_images(index, data.index["test"].presence)}
        assert learned & set(shown["train"]) == {n for n, s in shown["train"].items() if s & new}
        assert {n for n in shown["test"] if n in tested} == {
            n for n, s in shown["test"].items() if s & set(range(1, 7 + index))
        }
