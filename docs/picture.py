"""A picture of what each method predicts after the last step: `python docs/picture.py PROTOCOL OUT.png [--results DIR] [--images 5]`.

Rows: test images that show old and new classes; columns: the image, its labels, and each method of the results folder. Black is
background, white is void. The README's picture is made by its first line followed by `python docs/picture.py shapes-6-2 docs/shapes-6-2.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from bench.data.dataset import locate
from bench.data.index import class_indexes
from bench.data.loader import StepData
from bench.models.build import build_network
from bench.registry import method
from bench.step import fill, protocol_of
from bench.store import Store, read_json
from bench.tensors import read_tensors
from bench.train import normalise

GAP, TITLE = 4, 14


def palette(n: int) -> np.ndarray:
    """n colours that differ, black first; uint8 [256, 3], void white."""
    colours = np.zeros((256, 3), np.uint8)
    for k in range(1, n):
        hue, light = (k * 0.381966) % 1, 200 if k % 2 else 130
        colours[k] = [int(light * (0.5 + 0.5 * np.cos(2 * np.pi * (hue + shift)))) + 40 for shift in (0, 1 / 3, 2 / 3)]
    colours[255] = 255
    return colours


def predictions(folder: Path, images: torch.Tensor) -> tuple[np.ndarray, dict[str, object]]:
    """Classes [N, H, W] that a finished step predicts for uint8 images [N, H, W, 3], and the step's record."""
    job = read_json(folder / "job.json")
    protocol = protocol_of(job)
    spec = method(job["method"])
    built = spec.build(spec.config(**job["settings"]))
    index = len(job["inputs"]["classes"]) - 1
    values = built.config.at(index)
    heads = built.heads([protocol.step(t).n_new for t in range(index + 1)])
    network = build_network(values["network"], heads, spec.classifier, values["norm"])
    fill(network, read_tensors(folder / "model.safetensors")[0], folder)
    built.attach(protocol.step(index), network, None, None, {})  # type: ignore[arg-type]
    network.eval()
    with torch.inference_mode():
        return built.predict(network(normalise(images)).logits).numpy().astype(np.uint8), job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("protocol")
    parser.add_argument("out")
    parser.add_argument("--results")
    parser.add_argument("--images", type=int, default=5)
    args = parser.parse_args()
    last: dict[str, Path] = {}
    for label, _, name, seed, _, folder in Store(args.results).links():
        if label == args.protocol and seed == 0:
            last[name] = folder  # links come step by step
    if not last:
        raise SystemExit(f"no result of {args.protocol}; train it with bench run --protocol {args.protocol} --methods …")
    job = read_json(next(iter(last.values())) / "job.json")
    protocol = protocol_of(job)
    index = class_indexes(protocol.dataset, job["data_root"])
    first = set(protocol.groups[0])
    mixed = [
        i for i, shows in enumerate(index["test"].presence)
        if len(seen := {c for c in protocol.order[1:] if shows >> c & 1}) > 2 and seen & first and seen - first
    ][: args.images]  # fmt: skip
    values = method(job["method"]).config(**job["settings"]).at(0)
    data = StepData(protocol, protocol.step(0), locate(protocol.dataset, job["data_root"]), index, values, seed=0)
    raw = next(iter(data.loader(data.test_images(mixed), 0, purpose="test", shuffle=False, drop_last=False)))
    channel = np.full(256, 255, np.uint8)
    channel[list(protocol.order)] = np.arange(len(protocol.order))
    colours = palette(len(protocol.order))
    columns: list[tuple[str, np.ndarray]] = [("image", raw["images"].numpy()), ("labels", colours[channel[raw["labels"].numpy()]])]
    order = sorted(last, key=lambda name: (not method(name.partition("[")[0]).cls.at_once, name))
    for name in order:
        found, _ = predictions(last[name], raw["images"])
        columns.append((name, colours[found]))
    side = raw["images"].shape[1]
    sheet = Image.new("RGB", (len(columns) * (side + GAP) - GAP, TITLE + len(mixed) * (side + GAP) - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (name, pictures) in enumerate(columns):
        draw.text((x * (side + GAP) + 2, 0), name, fill="black")
        for y, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (x * (side + GAP), TITLE + y * (side + GAP)))
    sheet.save(args.out)


if __name__ == "__main__":
    main()
