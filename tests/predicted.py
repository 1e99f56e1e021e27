"""Networks whose predictions are given: tests of what is scored need no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.method import Method, Settings
from bench.protocol.protocol import Protocol
from bench.testing.tensors import TensorData, tensor_data
from bench.train.trainer import Trainer


class Reads(Method):
    """A method that predicts what stands in the first colour of an image."""

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        assert output.shape[-2:] == size
        return output[:, 0].round().long()


class Colours(nn.Module):
    """A network that hands on what it sees, undone of the normalisation; it notes in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.modes.add(self.training)
        return (images * 0.229 + 0.485) * 255


def opened(
    protocol: Protocol,
    index: int,
    labels: np.ndarray,
    predictions: np.ndarray,
    shows: Sequence[set[int]],
    size: int,
    **settings: Any,
) -> tuple[Trainer, TensorData]:
    """A trainer and data whose network predicts what is given.

    Args:
        protocol, index: the step.
        labels: of the test images, class ids [N, S, S].
        predictions: channels [N, S, S].
        shows: classes of each whole image.
        size: of a batch.
        settings: more of them.
    """
    config = Settings(batch_size=size, crop=max(8, labels.shape[1]), **settings)
    images = torch.from_numpy(np.repeat(predictions[..., None], 3, axis=-1).astype(np.uint8))
    test = images, torch.from_numpy(labels)
    data = tensor_data(protocol, index, config, (), test, epochs=1, shows=[sorted(s) for s in shows])
    method = Reads(config)
    method.step, method.data, method.network = data.step, data, Colours()
    return Trainer(method, 0, torch.device("cpu")), data
