"""The data set `shapes`: textured objects of ten classes on textured grounds, drawn in seconds from a seed.

It shows on a laptop what class-incremental segmentation is about. Several classes share an image, with skewed
co-occurrence (old classes appear in the images of new ones), unlabelled distractors lie in the background,
and there are saliency maps that cover objects and distractors alike. As in VOC, a part of the training masks
and all test masks carry a void border.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from pydantic import JsonValue

from bench.data.dataset import IGNORE
from bench.progress import track

VERSION = 1
SIZE = 96
IMAGES = {"train": 600, "test": 200}
CLASSES = ("disc", "box", "triangle", "ring", "cross", "star", "diamond", "hexagon", "crescent", "arrow")
PARAMETERS: Mapping[str, JsonValue] = {"size": SIZE, "images": {**IMAGES}, "classes": [*CLASSES]}
FREQUENCY = np.array([1.0, 1.0, 0.9, 0.9, 0.8, 0.8, 0.8, 0.7, 0.7, 0.7])


def _companions() -> np.ndarray:
    """Row c: how often each class joins class c in an image; neighbours on a circle come together."""
    distance = np.abs(np.subtract.outer(np.arange(10), np.arange(10) * 3)) % 10
    weight = 0.15 + np.exp(-np.minimum(distance, 10 - distance).astype(float))
    return weight / weight.sum(1, keepdims=True)


def _textures() -> np.ndarray:
    """Row c: two colours (6), frequency, angle, squareness of the grating."""
    rng = np.random.default_rng(7)
    rows = []
    for c in range(len(CLASSES)):
        hue = c * 0.381966
        base = 0.5 + 0.3 * np.cos(2 * np.pi * (hue + np.array([0.0, 1 / 3, 2 / 3])))
        second = np.clip(base + rng.uniform(-0.4, 0.4, 3), 0, 1)
        rows.append([*base, *second, rng.uniform(0.25, 0.9), rng.uniform(0, np.pi), rng.uniform(0.5, 3.0)])
    return np.array(rows)


COMPANIONS = _companions()
TEXTURES = _textures()
YY, XX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise in [0, 1], [SIZE, SIZE], with features of about `cells` pixels."""
    small = rng.random((max(2, SIZE // cells), max(2, SIZE // cells))).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _polygon(radii: list[float], turn: float) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [(r * math.cos(turn + k * step), r * math.sin(turn + k * step)) for k, r in enumerate(radii)]


def _outline(c: int, radius: float, turn: float, centre: tuple[float, float]) -> np.ndarray:
    """The pixels of one object of class c, bool [SIZE, SIZE]."""
    canvas = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(canvas)

    def ellipse(r: float, fill: int, dx: float = 0.0) -> None:
        x, y = centre[0] + dx * math.cos(turn), centre[1] + dx * math.sin(turn)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(centre[0] + x, centre[1] + y) for x, y in points], fill=1)

    def bar(length: float, width: float, angle: float) -> None:
        a, b = length * math.cos(angle), length * math.sin(angle)
        p, q = width * math.sin(angle), -width * math.cos(angle)
        polygon([(a + p, b + q), (a - p, b - q), (-a - p, -b - q), (-a + p, -b + q)])

    match CLASSES[c]:
        case "disc":
            ellipse(radius, 1)
        case "box":
            polygon(_polygon([radius] * 4, turn))
        case "triangle":
            polygon(_polygon([radius * 1.15] * 3, turn))
        case "ring":
            ellipse(radius, 1)
            ellipse(radius * 0.5, 0)
        case "cross":
            bar(radius, radius * 0.36, turn)
            bar(radius, radius * 0.36, turn + math.pi / 2)
        case "star":
            polygon(_polygon([radius * 1.15, radius * 0.5] * 5, turn))
        case "diamond":
            polygon(_polygon([radius * 1.2, radius * 0.65] * 2, turn))
        case "hexagon":
            polygon(_polygon([radius] * 6, turn))
        case "crescent":
            ellipse(radius, 1)
            ellipse(radius * 0.8, 0, radius * 0.55)
        case "arrow":
            bar(radius, radius * 0.28, turn)
            polygon(
                [
                    (x + radius * 0.6 * math.cos(turn), y + radius * 0.6 * math.sin(turn))
                    for x, y in _polygon([radius * 0.75] * 3, turn)
                ]
            )
    return np.asarray(canvas) > 0


def _paint(texture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A field of one class's texture with its own lighting, float [SIZE, SIZE, 3]."""
    angle, frequency = texture[7] + rng.normal(0, 0.2), texture[6] * rng.uniform(0.8, 1.2)
    phase = frequency * (XX * np.cos(angle) + YY * np.sin(angle)) + rng.uniform(0, 6.3)
    wave = 0.5 + 0.5 * np.tanh(texture[8] * np.sin(phase))[..., None]
    colour = texture[:3] + (texture[3:6] - texture[:3]) * wave
    return (colour + rng.normal(0, 0.06, 3)) * rng.uniform(0.7, 1.25)


def draw_image(split: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image uint8 [96, 96, 3], mask (0 to 10, 255 void) and saliency (0 or 255) uint8 [96, 96]."""
    rng = np.random.default_rng([VERSION, split == "test", number])
    ground = sum(_noise(rng, cells) * share for cells, share in ((32, 0.5), (8, 0.3), (3, 0.2)))
    image = rng.uniform(0.25, 0.75, 3) * (0.45 + 0.9 * np.asarray(ground)[..., None])
    mask = np.zeros((SIZE, SIZE), np.uint8)
    salient = np.zeros((SIZE, SIZE), bool)
    for _ in range(rng.integers(0, 3)):  # distractors: salient, of no class
        outline = _outline(
            int(rng.integers(10)), rng.uniform(7, 15), rng.uniform(0, 6.3), tuple(rng.uniform(8, SIZE - 8, 2))
        )
        strange = np.concatenate(
            [rng.uniform(0, 1, 6), rng.uniform(0.1, 0.9, 1), rng.uniform(0, 3.1, 1), rng.uniform(0.3, 3, 1)]
        )
        image[outline] = _paint(strange, rng)[outline]
        salient |= outline
    first = int(rng.choice(10, p=FREQUENCY / FREQUENCY.sum()))
    others = rng.choice(10, size=rng.integers(0, 4), p=COMPANIONS[first])
    for c in (first, *map(int, others)):
        outline = _outline(c, rng.uniform(10, 24), rng.uniform(0, 6.3), tuple(rng.uniform(12, SIZE - 12, 2)))
        image[outline] = _paint(TEXTURES[c], rng)[outline]
        mask[outline] = c + 1
        salient |= outline
    light = 0.7 + 0.6 * _noise(rng, SIZE // 2)[..., None]
    image = image * light + rng.normal(0, 0.04, image.shape)
    if split == "test" or number % 4 == 0:
        label = Image.fromarray(mask)
        edge = np.asarray(label.filter(ImageFilter.MaxFilter(3))) != np.asarray(
            label.filter(ImageFilter.MinFilter(3))
        )
        mask = np.where(edge, np.uint8(IGNORE), mask)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), mask, salient.astype(np.uint8) * 255


def draw(root: Path) -> None:
    """Draw all images, masks, saliency maps and lists into `root`. The same files every time."""
    for folder in ("images", "masks", "saliency"):
        (root / folder).mkdir(parents=True)
    jobs = [(split, i) for split, count in IMAGES.items() for i in range(count)]
    for split, i in track(jobs, total=len(jobs), text="drawing the data set shapes"):
        name = f"{split}_{i:04d}"
        image, mask, salient = draw_image(split, i)
        Image.fromarray(image).save(root / "images" / f"{name}.png", compress_level=1)
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        Image.fromarray(salient).save(root / "saliency" / f"{name}.png")
    for split, count in IMAGES.items():
        (root / f"{split}.txt").write_text("".join(f"{split}_{i:04d}\n" for i in range(count)))
