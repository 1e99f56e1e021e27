"""DKD: Decomposed Knowledge Distillation for Class-Incremental Semantic Segmentation (Baek et al., NeurIPS
2022).

Sigmoid scores without a background class: a pixel is background where no class exceeds one half. Each logit
is divided into what the positive and what the negative weights of its classifier contribute, and both parts
are distilled beside the logit itself. An auxiliary classifier learns to say no everywhere; each new
classifier starts as its copy.

Channels: 0 the auxiliary classifier, k the k-th class. The variant "m" is DKD-M: a memory of whole images,
labelled with the current step's classes only, so that it serves distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from bench.lazy import F, torch
from bench.method import Later, Method, replay
from methods.ssul import sigmoid_pseudo_labels

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch, Batches, Group, Images, Length, Output
    from bench.models.classifier import Classifier


def class_bce(logits: Tensor, targets: Tensor, pos_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy of each channel, [C]: the mean over images and pixels.

    Args:
        logits, targets: [B, C, H, W], targets from 0 to 1.
        pos_weight: weight of the positive part.
    """
    weight = torch.tensor(pos_weight, device=logits.device)
    return F.binary_cross_entropy_with_logits(
        logits, targets.to(logits.dtype), pos_weight=weight, reduction="none"
    ).mean(dim=(0, 2, 3))


def new_class_bce(logits: Tensor, labels: Tensor, n_new: int, pos_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy of the newest channels, [n_new]; background and ignored pixels are negatives.

    Args:
        logits: [B, C, H, W], the last `n_new` channels are the step's classes.
        labels: int64 [B, H, W].
        pos_weight: weight of the positive part.

    Source: spec/eir.md section 7.
    """
    n_old = logits.shape[1] - n_new
    classes = torch.arange(n_old, logits.shape[1], device=labels.device).view(1, -1, 1, 1)
    return class_bce(logits[:, n_old:], labels.unsqueeze(1) == classes, pos_weight)


def distillation(values: Tensor, values_old: Tensor) -> Tensor:
    """Binary cross-entropy of the old channels against the old network's scores, [C_old].

    Args:
        values: [B, C, h, w] with C >= C_old: foreground logits, or their positive or negative parts.
        values_old: the same of the old network, [B, C_old, h, w].

    Source: spec/eir.md section 7.
    """
    return class_bce(values[:, : values_old.shape[1]], torch.sigmoid(values_old))


def auxiliary_bce(logits: Tensor) -> Tensor:
    """Binary cross-entropy of the auxiliary channel against 0 everywhere, [1]."""
    return class_bce(logits[:, :1], torch.zeros_like(logits[:, :1]))


def incremental_terms(
    new: Output, old: Output | None, labels: Tensor, n_new: int, pos_weight: float
) -> dict[str, Tensor]:
    """Every term of the loss, unweighted, one value a class.

    Args:
        new, old: what the network and the old network make of the batch; no old network at step 0.
        labels: int64 [B, H, W].
        n_new: classes of the step.
        pos_weight: weight of the positive part of "bce".

    Source: spec/eir.md section 7.
    """
    terms = {
        "bce": new_class_bce(new.logits, labels, n_new, pos_weight),
        "auxiliary": auxiliary_bce(new.logits),
    }
    if old is not None:
        terms["kd"] = distillation(new.logits[:, 1:], old.logits[:, 1:])
        terms["kd_positive"] = distillation(new.extra["positive"], old.extra["positive"])
        terms["kd_negative"] = distillation(new.extra["negative"], old.extra["negative"])
    return terms


def weighted_sums(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Each term summed over its classes and times its weight."""
    return {name: weights[name] * term.sum() for name, term in terms.items()}


def auxiliary_head_transfer(classifier: Classifier) -> None:
    """Every class of the newest head starts as the auxiliary classifier, weight and bias; changed in
    place."""
    with torch.no_grad():
        for source, target in zip(
            classifier.heads[0].parameters(), classifier.heads[-1].parameters(), strict=True
        ):
            target.copy_(source.expand_as(target))


def predict_foreground_threshold(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """The class with the highest score, or background where none exceeds the threshold; channel 0 plays no
    part.

    Args:
        logits: [B, C, H, W].
        threshold: of the sigmoid score, exclusive.

    Returns:
        int64 [B, H, W].

    Source: spec/eir.md section 6.
    """
    score, best = torch.sigmoid(logits[:, 1:]).max(dim=1)
    return torch.where(score > threshold, best + 1, 0)


def foreground_pseudo_labels(logits_old: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Old classes on background pixels where the highest foreground score reaches the threshold; int64 [B, H,
    W]."""
    without_auxiliary = F.pad(logits_old[:, 1:], (0, 0, 0, 0, 1, 0), value=-torch.inf)
    return sigmoid_pseudo_labels(without_auxiliary, labels, 0, threshold)


class DKD(Method):
    """Distilled logits and their positive and negative parts, auxiliary classifier, frozen norms."""

    title = "DKD"
    paper = "Baek, Oh, Lee, Lee and Ham, NeurIPS 2022"
    classifier = "auxiliary"

    class Config(Method.Config):
        """Hyper-parameters of DKD."""

        pos_weight: float = Field(1.0, gt=0)
        """Weight of positive pixels in the cross-entropy of the step's classes."""
        first_pos_weight: float | None = Field(2.0, gt=0)
        """The same at step 0."""
        auxiliary: float = Field(1.0, ge=0)
        """Weight of the auxiliary classifier's loss."""
        distillation: Later[float] = Field(5.0, ge=0)
        """Weight of the old logits' distillation."""
        positive: Later[float] = Field(5.0, ge=0)
        """Weight of the distillation of the logits' positive parts."""
        negative: Later[float] = Field(5.0, ge=0)
        """Weight of the distillation of the logits' negative parts."""
        memory_size: Later[int] = Field(0, ge=0)
        """Images in memory (DKD-M); fewer are kept where there are not so many."""
        memory_threshold: Later[float] = Field(0.9, ge=0, le=1)
        """Least score of a prediction that counts as a class of a candidate for the memory."""

    def heads(self, sizes: Sequence[int]) -> list[int]:
        return [1, sizes[0] - 1, *sizes[1:]]

    def init_classifier(self) -> None:
        auxiliary_head_transfer(self.network.classifier)

    def start_step(self) -> None:
        if self.step.index and self.config.memory_size:
            classes = self.classes_of_candidates
            self.state[replay.STATE] = replay.draw_memory(
                self.data, self.previous, classes, self.config.memory_size
            )

    def classes_of_candidates(self, batch: Batch) -> Sequence[Sequence[int] | None]:
        """What images of the previous step show in a random crop (as in EIR; the specification does not say
        for DKD-M): their labels, from the third step on completed by the previous network.
        """
        labels = batch.labels
        if self.step.index > 1:
            labels = foreground_pseudo_labels(batch.teacher.logits, labels, self.config.memory_threshold)
        return replay.shown_classes(labels)

    def setup(self) -> None:
        from bench.models.abn import norm_layers

        self.training = self.training_images()
        if self.step.index:
            for norm in norm_layers(self.network):
                norm.requires_grad_(False)

    def training_images(self) -> Images | replay.WithExemplars:
        """The step's images and those in memory, all labelled with the step's classes."""
        names = self.memory()
        return (
            self.data.images(self.step.index, [*self.data.names(self.step.index), *names])
            if names
            else self.data.train
        )

    def train_mode(self) -> None:
        self.network.train(
            self.step.index == 0
        )  # later steps keep the norms' statistics, and no feature is dropped

    def parameter_groups(self) -> list[Group]:
        groups = super().parameter_groups()
        if not self.step.index:
            return groups
        newest = list(self.network.classifier.heads[-1].parameters())
        for group in groups:  # weight decay would wear old knowledge away
            group["params"] = [p for p in group["params"] if not any(p is own for own in newest)]
            group["weight_decay"] = 0.0
        return [*groups, {"params": newest, "lr": self.config.lr}]

    def batches(self, epoch: int) -> Batches:
        return self.data.loader(self.training, epoch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        c, step = self.config, self.step
        old = batch.teacher if step.index else None
        terms = incremental_terms(batch.output, old, batch.labels, len(step.classes), self.config.pos_weight)
        weights = {
            "bce": 1.0,
            "auxiliary": c.auxiliary,
            "kd": c.distillation,
            "kd_positive": c.positive,
            "kd_negative": c.negative,
        }
        return weighted_sums(terms, weights)

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        return predict_foreground_threshold(output.logits)

    @classmethod
    def lengths(cls, config: Any, index: int, images: int) -> dict[str, Length]:
        return super().lengths(config, index, images + (config.memory_size if index else 0))

    @classmethod
    def footnotes(cls, config: Any) -> list[str]:
        return [*cls.caveats, *([f"memory of {config.memory_size} images"] if config.memory_size else [])]
