"""A throw-away benchmark in a folder: a data set of coloured boxes, its TOML, and a protocol that is learned
in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SECONDS_EACH = ("epochs=1", "first_epochs=2", "batch_size=4", "crop=32")
"""Items of --set under which a step takes about a second."""


def write_benchmark(
    folder: Path,
    n_classes: int = 4,
    images: int = 24,
    size: int = 32,
    first: int = 2,
    then: int = 1,
    name: str = "toy",
) -> Path:
    """Write data set and protocol; returns the protocol's file.

    Class c is a box of a colour of its own. Image i shows class i % n + 1 and, every third, a second one;
    there are saliency maps, and half as many test images as training images.

    Args:
        folder: where <name>/, <name>-set.toml and <name>-<first>-<then>.toml go.
        n_classes: without background.
        images: for training.
        size: side of an image in pixels.
        first, then: classes of step 0, and of each later step.
        name: of the data set.
    """
    root = folder / name
    rng = np.random.default_rng(0)
    for kind in ("images", "masks", "saliency"):
        (root / kind).mkdir(parents=True)
    for split, count in (("train", images), ("test", images // 2)):
        names = [f"{split}{i:03d}" for i in range(count)]
        for i, image_name in enumerate(names):
            mask = np.zeros((size, size), np.uint8)
            for c in [i % n_classes] + ([(i + 1) % n_classes] if i % 3 == 0 else []):
                y, x = rng.integers(0, size // 2, 2)
                mask[y : y + size // 3, x : x + size // 3] = c + 1
            palette = np.concatenate(
                [[[90, 90, 90]], np.random.default_rng(1).integers(0, 255, (n_classes, 3))]
            )
            image = np.clip(palette[mask] + rng.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / f"{image_name}.png")
            Image.fromarray(mask).save(root / "masks" / f"{image_name}.png")
            Image.fromarray(((mask > 0) * 255).astype(np.uint8)).save(root / "saliency" / f"{image_name}.png")
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    classes = ", ".join(f'"c{c}"' for c in range(1, n_classes + 1))
    files = 'lists = ["{0}.txt"]\nimage = "images/{{name}}.png"\nmask = "masks/{{name}}.png"\n'
    (folder / f"{name}-set.toml").write_text(
        f'classes = ["background", {classes}]\nroots = [".", "{name}"]\n'
        f"[train]\n{files.format('train')}[test]\n{files.format('test')}"
        '[maps.saliency]\ntrain = "saliency/{name}.png"\n'
    )
    protocol = folder / f"{name}-{first}-{then}.toml"
    protocol.write_text(f'dataset = "{name}-set.toml"\nfirst = {first}\nthen = {then}\n')
    return protocol
