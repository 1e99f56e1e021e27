"""What the adapters of several families share."""

import numpy as np
import torch

from bench.data.dataset import Dataset, Split
from bench.protocol.images import bits
from bench.train.evaluate import batch_counts


def t(array):
    """An array of a case as a tensor."""
    return torch.from_numpy(np.array(array))


def leaf(array):
    """The same, to be differentiated by."""
    return t(array).requires_grad_()


def toy_dataset(name, n_classes):
    """A data set of the kind of VOC or ADE with some classes only."""
    background = "unlabelled" if name == "ade" else "class"
    split = Split(image="{name}.jpg", mask="{name}.png")
    classes = tuple(map(str, range(n_classes)))
    return Dataset(name=name, title=name, classes=classes, background=background, train=split, test=split)


def presence(masks):
    """Which classes each mask shows, as a class index has it."""
    return [bits(np.setdiff1d(np.unique(m), [0, 255]).tolist()) for m in masks]


def confusion(labels, predictions, n):
    """Confusion counts [n, n] of some images, as the engine's evaluation counts them."""
    return batch_counts(t(labels).long(), t(predictions).long(), n, n).sum(0).numpy()
