"""Label remapping by look-up table against a Python function a pixel, and the class index with all cores
against one.

python benchmarks/labels.py --data-root VOC
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from PIL import Image
from side_by_side import measure, show

from bench.data.dataset import load_dataset
from bench.data.index import build
from bench.data.locate import Files, locate
from bench.protocol.file import load
from bench.protocol.labels import training_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--images", type=int, default=4000, help="masks for the class index")
    args = parser.parse_args()
    files = locate(load_dataset("voc"), args.data_root)["train"]
    table = training_table(load("voc-15-1"), 1, "plop")
    mapping = {value: int(table[value]) for value in range(256)}
    mask = np.asarray(Image.open(files.mask(files.names[0])))
    a_pixel = np.vectorize(lambda value: mapping[value], otypes=[np.uint8])
    assert (a_pixel(mask) == table[mask]).all()
    show(
        measure({"look-up table": lambda: table[mask], "a function a pixel": lambda: a_pixel(mask)}, 20),
        "look-up table",
    )
    some = Files(files.dataset, files.split, files.root, files.names[: args.images])
    cores = len(os.sched_getaffinity(0))
    show(
        measure({"one core": lambda: build(some, 1), f"{cores} cores": lambda: build(some, cores)}, 3),
        "one core",
    )


if __name__ == "__main__":
    main()
