"""How long the command line takes to start and to plan, against `python -c pass`.

    python benchmarks/startup.py [--data-root VOC]

Planning needs VOC: that of --data-root, or one the script makes up in a temp folder (10,582 + 1,449 tiny
images). The class index, built once, is there when the clock starts.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from open_jobs import every_method
from PIL import Image
from side_by_side import measure, show

from bench.protocol.file import PROTOCOLS, load


def made_up_voc(root: Path) -> Path:
    """A VOC tree of tiny images, each class one file under many names."""
    rng = random.Random(0)
    kinds = {"JPEGImages": "jpg", "SegmentationClassAug": "png", "saliency_map": "png"}
    for folder in (*kinds, "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for folder, suffix in kinds.items():
        for c in range(1, 21):
            Image.new("RGB" if suffix == "jpg" else "L", (8, 8), (c, c, c) if suffix == "jpg" else c).save(
                root / folder / f"class{c}.{suffix}"
            )
    for file, count in (("train_aug", 10582), ("val", 1449)):
        names = [f"{file}_{i:06d}" for i in range(count)]
        (root / f"ImageSets/Segmentation/{file}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            c = rng.randint(1, 20)
            for folder, suffix in kinds.items():
                os.link(root / folder / f"class{c}.{suffix}", root / folder / f"{name}.{suffix}")
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root")
    root = parser.parse_args().data_root
    with tempfile.TemporaryDirectory() as folder:
        root = root or str(made_up_voc(Path(folder) / "voc"))
        tasks = [name for name in PROTOCOLS.known() if name.startswith("voc-")]
        methods = every_method()
        plan = [
            "plan",
            "--protocol",
            ",".join(tasks),
            "--methods",
            ",".join(methods),
            "--seeds",
            "0,1,2,3,4",
            "--data-root",
            root,
        ]
        bench = [sys.executable, "-m", "bench"]

        def command(*words: str) -> None:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

        command(*bench, *plan)
        times = measure(
            {
                "python -c pass": lambda: command(sys.executable, "-c", "pass"),
                "bench --help": lambda: command(*bench, "--help"),
                "bench list protocols": lambda: command(*bench, "list", "protocols"),
                "bench plan, all of VOC": lambda: command(*bench, *plan),
            }
        )
        steps = sum(len(load(t).groups) for t in tasks)
        print(f"plan: {len(tasks)} protocols ({steps} steps) x {len(methods)} methods x 5 seeds")
        show(times, "python -c pass")


if __name__ == "__main__":
    main()
