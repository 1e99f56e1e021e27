"""What tests share: a tiny data set in a temp folder, and the data that CI makes available."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import Bench
from PIL import Image

SHARED_VARIABLE = "CISS_BENCH_SHARED"
"""Folder with the real label maps, class indexes and official image lists; .ci/run sets it."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, for tests that hold the project against it."""
    folder = os.environ.get(SHARED_VARIABLE)
    if not folder:
        pytest.skip(f"real data: {SHARED_VARIABLE} is not set")
    return Path(folder)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder: caches and results land there."""
    monkeypatch.chdir(tmp_path)
    for variable in ("CISS_BENCH_DATA", "CISS_BENCH_RESULTS"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def toy(in_tmp: Path) -> Callable[..., Path]:
    """Writes a throw-away benchmark: a data set of coloured boxes, its TOML, and a protocol. Returns the protocol file.

    Class c is a box of a colour of its own. Image i shows class i % n + 1 and, every third, a second one.
    """

    def make(n_classes: int = 4, images: int = 24, size: int = 32, first: int = 2, then: int = 1, root: str = "toy") -> Path:
        folder = in_tmp / root
        rng = np.random.default_rng(0)
        for kind in ("images", "masks", "saliency"):
            (folder / kind).mkdir(parents=True)
        for split, count in (("train", images), ("test", images // 2)):
            names = []
            for i in range(count):
                name = f"{split}{i:03d}"
                names.append(name)
                mask = np.zeros((size, size), np.uint8)
                for k, c in enumerate([i % n_classes] + ([(i + 1) % n_classes] if i % 3 == 0 else [])):
                    y, x = rng.integers(0, size // 2, 2)
                    mask[y : y + size // 3, x : x + size // 3] = c + 1
                    del k
                palette = np.concatenate([[[90, 90, 90]], np.random.default_rng(1).integers(0, 255, (n_classes, 3))])
                image = np.clip(palette[mask] + rng.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / "images" / f"{name}.png")
                Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
                Image.fromarray(((mask > 0) * 255).astype(np.uint8)).save(folder / "saliency" / f"{name}.png")
            (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
        classes = ", ".join(f'"c{c}"' for c in range(1, n_classes + 1))
        split_text = 'lists = ["{0}.txt"]\nimage = "images/{{name}}.png"\nmask = "masks/{{name}}.png"\nsaliency = "saliency/{{name}}.png"\n'
        (in_tmp / f"{root}-set.toml").write_text(
            f'classes = ["background", {classes}]\nroots = [".", "{root}"]\n[train]\n{split_text.format("train")}[test]\n{split_text.format("test")}'
        )
        protocol = in_tmp / f"{root}-{first}-{then}.toml"
        protocol.write_text(f'dataset = "{root}-set.toml"\nfirst = {first}\nthen = {then}\n')
        return protocol

    return make


@pytest.fixture
def quick() -> list[str]:
    """Settings under which a step of the toy data set takes about a second."""
    return ["epochs=1", "first_epochs=2", "batch_size=4", "crop=32"]


@pytest.fixture
def command(toy: Callable[..., Path], in_tmp: Path) -> Iterator[Bench]:
    """The command `bench` in a throw-away benchmark."""
    bench = Bench(in_tmp, toy(then=2))
    yield bench
    bench.stop_all()
