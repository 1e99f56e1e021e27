"""Selection on test images, as SSUL and MBS do it: by name only, and marked wherever the number appears."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bench.method.step_data import StepData
from bench.protocol.labels import rule
from bench.score.counts import fold
from bench.score.iou import class_iou
from bench.train.evaluate import evaluate
from bench.train.trainer import Trainer


class BestOnTest:
    """Keeps the weights that score best on the test images that show the step's own classes.

    Source: spec/ssul.md section 10, spec/mbs.md section 6. A step of fewer than 100 iterations is never
    validated; then the last iterate stays, where the authors' code keeps the untrained network.
    """

    def __init__(self, trainer: Trainer, data: StepData) -> None:
        self.trainer, self.data = trainer, data
        labels, presence = rule(data.config.label_rule), data.index["test"].presence
        self.positions = labels.images("validation", data.protocol, data.step.index, presence)
        self.images = data.test_images(self.positions)
        self.score = -1.0
        self.weights: dict[str, Tensor] = {}

    def after_iteration(self, done: int, total: int) -> None:
        """Validate as often as the method says."""
        if done % self.trainer.method.validation_interval(total):
            return
        value = self.validate()
        if value > self.score:
            self.score = value
            self.weights = {
                k: v.detach().clone() for k, v in self.trainer.method.network.state_dict().items()
            }
        self.trainer.method.train_mode()

    def validate(self) -> float:
        """Mean IoU of the step's classes (background among them at step 0) on the test images that show one
        of them."""
        step, dataset = self.data.step, self.data.protocol.dataset
        counts = evaluate(self.trainer, self.data, self.images, self.positions)
        matrix = fold(counts.total(), counts.rows, self.data.config.label_rule, dataset, step, "validation")
        return float(class_iou(matrix)[step.n_old :].mean())

    def restore(self) -> None:
        """Put the best weights back, if any were kept."""
        if self.weights:
            self.trainer.method.network.load_state_dict(self.weights)

    def load(self, score: float, weights: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint kept."""
        self.score = score
        self.weights = {k: v.to(self.trainer.device) for k, v in weights.items()}
