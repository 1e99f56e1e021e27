"""A picture of what each method predicts after the last step.

    python docs/picture.py PROTOCOL OUT.png [--results DIR] [--images 5]

Rows: test images that show old and new classes; columns: the image, its labels, and each method of the
    results folder.
Black is background, white is void. The README's picture is made by its first line followed by
`python docs/picture.py shapes-6-2 docs/shapes-6-2.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from bench.method.registry import method
from bench.plan.plan import evaluation_of
from bench.protocol.protocol import Protocol
from bench.store.records import ChainRecord, JobRecord, read_record
from bench.store.results import Store
from bench.train.session import Session, open_job

GAP, TITLE = 4, 14


def palette(n: int) -> np.ndarray:
    """n colours that differ, black first; uint8 [256, 3], void white."""
    colours = np.zeros((256, 3), np.uint8)
    for k in range(1, n):
        hue, light = (k * 0.381966) % 1, 200 if k % 2 else 130
        waves = [0.5 + 0.5 * np.cos(2 * np.pi * (hue + shift)) for shift in (0, 1 / 3, 2 / 3)]
        colours[k] = [int(light * wave) + 40 for wave in waves]
    colours[255] = 255
    return colours


def opened(folder: Path, store: Store) -> Session:
    """A finished job, open for a look."""
    record = read_record(folder / JobRecord.file, JobRecord)
    assert record is not None
    return open_job(evaluation_of(record), store)


def mixed(session: Session, protocol: Protocol, count: int) -> list[int]:
    """Positions of the first test images that show three classes or more, old ones and new ones among
    them."""
    first, found = set(protocol.groups[0]), []
    for i, shows in enumerate(session.data.index["test"].presence):
        seen = {c for c in protocol.order[1:] if shows >> c & 1}
        if len(seen) > 2 and seen & first and seen - first:
            found.append(i)
    return found[:count]


def look(session: Session, positions: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 [N, S, S, 3], labels as class ids [N, S, S], and predicted channels [N, S, S]."""
    images, labels, predictions = [], [], []
    built = session.method
    built.network.eval()
    with (
        torch.inference_mode(),
        session.data.once(session.data.test_images(positions), "test", shuffle=False) as loader,
    ):
        for raw in loader:
            batch = session.trainer.batch(raw)
            height, width = batch.labels.shape[-2:]
            found = built.predict(built.network(batch.images), (height, width))
            images.append(raw["images"].numpy())
            labels.append(raw["labels"].numpy())
            predictions.append(found.cpu().numpy().astype(np.uint8))
    return np.concatenate(images), np.concatenate(labels), np.concatenate(predictions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("protocol")
    parser.add_argument("out")
    parser.add_argument("--results")
    parser.add_argument("--images", type=int, default=5)
    args = parser.parse_args()
    store = Store(args.results)
    links = [link for link in store.links() if link.protocol == args.protocol and link.seed == 0]
    last = {link.method: link.folder for link in links}  # links come step by step
    if not last:
        raise SystemExit(f"no result of {args.protocol}: bench run --protocol {args.protocol} --methods …")
    order = sorted(last, key=lambda name: (not method(name.partition("[")[0]).cls.at_once, name))
    chain = read_record(next(iter(last.values())).parents[1] / ChainRecord.file, ChainRecord)
    assert chain is not None
    columns: list[tuple[str, np.ndarray]] = []
    for name in order:
        with opened(last[name], store) as session:
            positions = mixed(session, chain.protocol, args.images)
            images, labels, found = look(session, positions)
            seen = session.data.protocol.order
        if not columns:
            channel = np.full(256, 255, np.uint8)
            channel[list(seen)] = np.arange(len(seen))
            colours = palette(len(seen))
            columns = [("image", images), ("labels", colours[channel[labels]])]
        columns.append((name, colours[found]))
    side = images.shape[1]
    width, height = len(columns) * (side + GAP) - GAP, TITLE + len(positions) * (side + GAP) - GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (name, pictures) in enumerate(columns):
        draw.text((x * (side + GAP) + 2, 0), name, fill="black")
        for y, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (x * (side + GAP), TITLE + y * (side + GAP)))
    sheet.save(args.out)


if __name__ == "__main__":
    main()
