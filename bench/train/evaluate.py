"""One pass over the test images: the confusion counts of each image, from which every convention follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bench import distributed
from bench.data.images import Images
from bench.method.step_data import StepData
from bench.score.counts import Counts
from bench.train.trainer import Trainer

SMOKE_IMAGES = 8


def batch_counts(labels: Tensor, predictions: Tensor, n_rows: int, n_columns: int) -> Tensor:
    """Confusion counts of each image of a batch by a single bincount on the device.

    Args:
        labels: int64 [B, H, W]; values outside 0 … n_rows-1 are not counted.
        predictions: int64 [B, H, W] in 0 … n_columns-1.

    Returns:
        int64 [B, n_rows, n_columns].
    """
    b = labels.shape[0]
    labels, predictions = labels.reshape(b, -1), predictions.reshape(b, -1)
    size = n_rows * n_columns
    image = torch.arange(b, device=labels.device).unsqueeze(1) * size
    cell = image + labels * n_columns + predictions
    cell = torch.where(
        (labels >= 0) & (labels < n_rows), cell, b * size
    )  # what is not counted goes into a last bin
    return torch.bincount(cell.flatten(), minlength=b * size + 1)[: b * size].view(b, n_rows, n_columns)


def evaluate(
    trainer: Trainer,
    data: StepData,
    images: Images | None = None,
    positions: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
    split: str = "test",
) -> Counts:
    """Counts of every test image (or of some `images` at `positions` of the list) under the network as it
    stands.

    The engine knows nothing of what the network puts out: the method's `predict` says which classes it means.
    Rows are all classes of the data set: the seen ones in channel order, then the others ascending by id.
    """
    method, step, dataset = trainer.method, data.step, data.protocol.dataset
    n_all = len(data.index[split].names)
    if images is None:
        positions = list(range(n_all if data.smoke is None else min(SMOKE_IMAGES, n_all)))
        images = data.test_images(positions, split)
    assert positions is not None
    rows = (*step.seen, *(c for c in range(1, len(dataset.classes)) if c not in step.seen))
    to_row = torch.full((256,), 255, dtype=torch.long, device=trainer.device)
    to_row[torch.tensor(rows)] = torch.arange(len(rows), device=trainer.device)
    n_classes = step.n_classes
    entries, values = [], []
    method.network.eval()
    for module in method.modules.values():
        module.eval()
    with torch.inference_mode(), data.once(images, "test", shuffle=False) as loader:
        for number, raw in enumerate(loader):
            with trainer.test_autocast():
                batch = trainer.batch(raw)
                height, width = batch.labels.shape[-2:]
                predictions = method.predict(method.network(batch.images), (height, width))
            counts = batch_counts(to_row[batch.labels], predictions, len(rows), n_classes)
            found = counts.nonzero()
            values.append(counts[tuple(found.T)].cpu().numpy())
            where = found.cpu().numpy()
            where[:, 0] = raw["index"].numpy()[where[:, 0]]
            entries.append(where)
            progress(number + 1, len(loader))
    shape = np.concatenate(entries) if entries else np.zeros((0, 3), np.int64)
    amounts = np.concatenate(values) if values else np.zeros(0, np.int64)
    shape, amounts = _from_all_processes(shape, amounts)
    seen = set(data.protocol.test_images(step.index, data.index[split].presence))
    return Counts(
        images=tuple(images.names),
        shows_seen=np.array([p in seen for p in positions]),
        rows=rows,
        n_classes=n_classes,
        entries=shape.astype(np.int32),
        values=amounts,
    )


def _from_all_processes(entries: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parts of every process that evaluated a share of the images, together."""
    parts = distributed.gathered((entries, values))
    return np.concatenate([e for e, _ in parts]), np.concatenate([v for _, v in parts])
