"""Selection on test images, as SSUL and MBS do it: by name only, and marked wherever the number appears."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import metrics
from bench.data.labels import rule
from bench.data.loader import StepData
from bench.evaluate import evaluate
from bench.train import Trainer

LEAST_INTERVAL = 100
"""Iterations between two validations are never fewer."""


class BestOnTest:
    """Keeps the weights that score best on the test images that show the step's own classes.

    Source: spec/ssul.md section 10, spec/mbs.md section 6. A step of fewer than 100 iterations is never validated; then the
    last iterate stays, where the authors' code keeps the untrained network.
    """

    def __init__(self, trainer: Trainer, data: StepData, validations: int) -> None:
        self.trainer, self.data, self.validations = trainer, data, validations
        self.score = -1.0
        self.weights: dict[str, Tensor] = {}

    def after_iteration(self, done: int, total: int) -> None:
        """Validate after every max(100, total // validations) iterations."""
        if done % max(LEAST_INTERVAL, total // self.validations):
            return
        value = self.validate()
        if value > self.score:
            self.score = value
            self.weights = {k: v.detach().clone() for k, v in self.trainer.method.network.state_dict().items()}
        self.trainer.method.train_mode()

    def validate(self) -> float:
        """Mean IoU of the step's classes (background among them at step 0) on the test images that show one of them."""
        step, protocol = self.data.step, self.data.protocol
        positions = rule(self.data.values["label_rule"]).images("validation", protocol, step.index, self.data.index["test"].presence)
        counts = evaluate(self.trainer, self.data, self.data.test_images(positions), positions)
        matrix = metrics.fold(counts.total(), counts.rows, self.data.values["label_rule"], protocol.dataset, step, "validation")
        return float(metrics.class_iou(matrix)[step.n_old :].mean())

    def restore(self) -> None:
        """Put the best weights back, if any were kept."""
        if self.weights:
            self.trainer.method.network.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        return {"score": self.score}

    def load(self, state: dict[str, Any], weights: dict[str, Tensor], device: torch.device) -> None:
        self.score = state["score"]
        self.weights = {k: v.to(device) for k, v in weights.items()}
