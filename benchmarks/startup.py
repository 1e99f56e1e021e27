"""How long the command line takes to start and to plan, against `python -c pass`.

    python benchmarks/startup.py [--data-root VOC]

Planning needs a class index of VOC: that of --data-root, or one the script makes up in a temp folder (10,582 + 1,449 images).
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import measure, show

from bench import protocol
from bench.errors import UserError
from bench.registry import method, method_names


def made_up_voc(root: Path) -> Path:
    """A VOC tree without images: lists and class indexes, which is all that planning reads."""
    rng = random.Random(0)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "class-index").mkdir()
    for split, file, count in (("train", "train_aug", 10582), ("test", "val", 1449)):
        names = [f"{split}_{i:06d}" for i in range(count)]
        (root / f"ImageSets/Segmentation/{file}.txt").write_text("\n".join(names) + "\n")
        lines = [f"{name} " + " ".join(map(str, sorted(rng.sample(range(1, 21), rng.choice([1, 1, 1, 2, 3]))))) for name in names]
        (root / f"class-index/{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def every_method() -> list[str]:
    names = []
    for name in method_names():
        try:
            names.append(method(name).name)
        except UserError:
            names += [f"{name}+mib", f"{name}+plop"]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root")
    root = parser.parse_args().data_root
    with tempfile.TemporaryDirectory() as folder:
        root = root or str(made_up_voc(Path(folder) / "voc"))
        tasks = ["voc-19-1", "voc-15-5", "voc-15-1", "voc-10-1", "voc-5-3", "voc-5-1", "voc-2-1", "voc-2-2"]
        methods = every_method()
        plan = ["plan", "--protocol", ",".join(tasks), "--methods", ",".join(methods), "--seeds", "0,1,2,3,4", "--data-root", root]
        bench = [sys.executable, "-m", "bench"]

        def command(*words: str) -> None:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

        times = measure(
            {
                "python -c pass": lambda: command(sys.executable, "-c", "pass"),
                "bench --help": lambda: command(*bench, "--help"),
                "bench list protocols": lambda: command(*bench, "list", "protocols"),
                "bench plan, all of VOC": lambda: command(*bench, *plan),
            }
        )
        steps = sum(len(protocol.load(t).groups) for t in tasks)
        print(f"plan: {len(tasks)} protocols ({steps} steps) x {len(methods)} methods x 5 seeds")
        show(times, "python -c pass")


if __name__ == "__main__":
    main()
