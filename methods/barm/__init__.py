"""BARM: Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic
Segmentation (Zhang and Gao, ECCV 2024).

Sigmoid scores and binary cross-entropy over background and all classes. Each later step adds a branch: a 3x3
convolution with norm and ReLU on the head's features (an "ear"), and a 1x1 classifier of the step's classes
and of one residual. The background's score is that of step 0 and the residuals of all later steps, which may
only lower it: where a new class stands, its residual says "no longer background". The whole network goes on
learning, most of it slowly; old branches are held by their features on background and by their scores.

Channels: 0 background, k the k-th class.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bench.lazy import F, at_least_float32, torch
from bench.method import CLASSIFIERS, IGNORE, ClassifierKind, Later, Length, Method, groups, mix
from methods.ssul import bce_ignore_multi_head, sigmoid_pseudo_labels

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Assembled, Batch, Batches, Group, Images, Output
    from bench.models.abn import Norm
    from bench.models.classifier import Classifier


def _residual_heads(channels: int, sizes: Sequence[int], network: Assembled, norm: Norm) -> Classifier:
    from methods.barm.heads import ResidualHeads

    return ResidualHeads(channels, sizes, (lambda width: [norm(width)]) if network.activated else None)


def _without_padding(network: Assembled) -> bool:
    return network.tokens is None


CLASSIFIERS.add(
    "residual-heads",
    ClassifierKind(
        "a branch of two convolutions a step, with a residual of the background (BARM)",
        _residual_heads,
        fits=_without_padding,
        needs="features of convolutions: scores are taken at their size",
    ),
)


def residual_on_new_classes(residual: Tensor, labels: Tensor) -> Tensor:
    """The residual is pushed down where the step's classes stand: softplus, the mean over these pixels.

    Args:
        residual: of the newest branch, [B, h, w].
        labels: of the step, not pseudo-labelled, int64 [B, h, w].

    Returns:
        0 without such a pixel.

    Source: spec/barm.md section 4, residual_new.
    """
    residual = at_least_float32(residual)
    new = ((labels != 0) & (labels != IGNORE)).to(residual.dtype)
    return (new * F.softplus(residual)).sum() / (new.sum() + 1e-8)


def residual_on_background(residual: Tensor, labels: Tensor) -> Tensor:
    """The residual is pushed up to 0, and no further, on background: max((1 - s)^2 - s^2, 0) of its score s.

    Args:
        residual, labels: as in `residual_on_new_classes`.

    Returns:
        The mean over background pixels. Without one the released code has 0 / 0; here it is 0: nothing to
        push up, no loss.

    Source: spec/barm.md section 4, residual_background.
    """
    score = torch.sigmoid(at_least_float32(residual))
    background = (labels == 0).to(score.dtype)
    excess = ((1 - score) ** 2 - score**2).clamp(min=0)
    return (background * excess).sum() / background.sum().clamp(min=1)


def branch_distillation(branches: Tensor, branches_old: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of the old branches' features on background.

    Args:
        branches: [B, n, D, h, w], the old ones first.
        branches_old: of the old network, [B, n_old, D, h, w].
        labels: as in `residual_on_new_classes`.

    Returns:
        A scalar: the mean over all elements of a branch, other pixels included, summed over branches.

    Source: spec/barm.md section 4, features.
    """
    held = branches[:, : branches_old.shape[1]]
    background = (labels == 0)[:, None, None].to(held.dtype)
    distance = at_least_float32(background * (held - branches_old)).square()
    return distance.mean(dim=(0, 2, 3, 4)).sum()


def score_distillation(scores: Tensor, scores_old: Tensor) -> Tensor:
    """Binary cross-entropy of every old channel, residuals among them, against the old network's score.

    Args:
        scores: logits of all branches, [B, N, h, w], the old ones first.
        scores_old: of the old network, [B, N_old, h, w].

    Returns:
        A scalar: the mean over images and pixels, summed over channels.

    Source: spec/barm.md section 4, scores.
    """
    held, targets = scores[:, : scores_old.shape[1]], torch.sigmoid(scores_old)
    loss = F.binary_cross_entropy_with_logits(held, targets, reduction="none")
    return at_least_float32(loss).mean(dim=(0, 2, 3)).sum()


def incremental_terms(new: Output, old: Output, labels: Tensor, threshold: float) -> dict[str, Tensor]:
    """Every term of the loss of a later step, unweighted.

    Args:
        new: of the network in training: only the newest residual and the new classes learn from "bce".
        old: of the old network in evaluation.
        labels: of the step, int64 [B, H, W].
        threshold: least score of a pseudo-label, inclusive.

    Source: spec/barm.md section 4.
    """
    n_old, scores_old = old.logits.shape[1], old.extra["scores"]
    targets = sigmoid_pseudo_labels(old.logits, labels, 0, threshold)
    held = new.logits[:, 1:n_old].detach()
    logits = torch.cat([new.logits[:, :1], held, new.logits[:, n_old:]], dim=1)
    small = F.interpolate(labels[:, None].float(), size=scores_old.shape[-2:], mode="nearest")[:, 0].long()
    residual = new.extra["scores"][:, scores_old.shape[1]]
    return {
        "bce": bce_ignore_multi_head(logits, targets),
        "residual_background": residual_on_background(residual, small),
        "features": branch_distillation(new.extra["branches"], old.extra["branches"], small),
        "scores": score_distillation(new.extra["scores"], scores_old),
        "residual_new": residual_on_new_classes(residual, small),
    }


def branch_transfer(classifier: Classifier, statistics: bool) -> None:
    """The newest ear starts as the first branch's convolution and norm; its 1x1 classifier stays random.

    Args:
        classifier: changed in place.
        statistics: copy the norm's running mean and variance too; else they stay 0 and 1.

    Source: spec/barm.md section 2, new branch.
    """
    first, newest = classifier.heads[0][:-1], classifier.heads[-1][:-1]
    copied = {name for name, _ in first.named_parameters()}
    if statistics:
        copied |= {name for name, _ in first.named_buffers() if not name.endswith("num_batches_tracked")}
    newest.load_state_dict({k: v for k, v in first.state_dict().items() if k in copied}, strict=False)


def predict_from_small_scores(small_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class with the highest score, where scores, not logits, are brought to the image's size.

    Args:
        small_logits: [B, C, h, w].
        size: (H, W) of the labels.

    Returns:
        int64 [B, H, W].

    Source: spec/barm.md section 6.
    """
    scores = torch.sigmoid(at_least_float32(small_logits))
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False).argmax(dim=1)


class BARM(Method):
    """Branches of the background's residual, everything trained slowly, features and scores held."""

    title = "BARM"
    paper = "Zhang and Gao, ECCV 2024"
    classifier = "residual-heads"

    class Config(Method.Config):
        """Hyper-parameters of BARM."""

        first_batch_size: int | None = Field(None, ge=2)
        """Images of one update at step 0."""
        first_selection: Literal["last", "best-on-test"] | None = None
        """Which iterate step 0 hands on."""
        threshold: Later[float] = Field(0.7, ge=0, le=1)
        """Least score of a pseudo-label."""
        residual_background: Later[float] = Field(5.0, ge=0)
        """Weight of pushing the newest residual up to 0 on background."""
        residual_new: Later[float] = Field(1.0, ge=0)
        """Weight of pushing the newest residual down where the step's classes stand."""
        features: Later[float] = Field(4.0, ge=0)
        """Weight of the distance of the old branches' features on background."""
        scores: Later[float] = Field(1.0, ge=0)
        """Weight of the distillation of the old branches' scores."""
        aspp_lr: Later[float] = Field(1.0, ge=0)
        """Factor on the learning rate for the head before the branches, after step 0."""
        old_lr: Later[float] = Field(0.1, ge=0)
        """Factor on the learning rate for the branches of earlier steps."""
        ear_statistics: Later[Literal["fresh", "copied"]] = "fresh"
        """Mean and variance of a new branch's norm, which never learn: 0 and 1, as the released code leaves
        them, or copied from the first branch with the rest of the norm."""
        half_of_the_data: Later[bool] = False
        """Train later steps on one half of their images, drawn once a step: what the released code's two
        processes do, whose gradients are never averaged."""

    def heads(self, sizes: Sequence[int]) -> list[int]:
        return [sizes[0], *(size + 1 for size in sizes[1:])]

    def init_classifier(self) -> None:
        branch_transfer(self.network.classifier, self.config.ear_statistics == "copied")

    def setup(self) -> None:
        from bench.models.abn import norm_layers

        self.training = self.training_images()
        if self.step.index:
            for norm in norm_layers(self.network):
                norm.requires_grad_(False)

    def training_images(self) -> Images:
        """The step's images, or the half of them that is trained on."""
        if not (self.step.index and self.config.half_of_the_data):
            return self.data.train
        names = self.data.names(self.step.index)
        drawn = random.Random(mix(self.data.seed, self.step.index, "half"))
        return self.data.images(self.step.index, sorted(drawn.sample(names, half(len(names)))))

    def train_mode(self) -> None:
        from bench.models.abn import norm_layers

        self.network.train()
        if self.step.index:  # dropout stays active, norms keep their statistics
            for norm in norm_layers(self.network):
                norm.eval()

    def parameter_groups(self) -> list[Group]:
        if not self.step.index:
            return super().parameter_groups()
        c, newest = self.config, len(self.network.classifier.heads) - 1
        factors = {
            f"classifier.heads.{newest}": 1.0,
            "head": c.aspp_lr,
            "classifier": c.old_lr,
            "body": c.body_lr,
        }
        return groups(self.network, c.lr, factors)

    def batches(self, epoch: int) -> Batches:
        return self.data.loader(self.training, epoch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.step.index:
            return {"bce": bce_ignore_multi_head(batch.output.logits, batch.labels)}
        c = self.config
        weights = {
            "bce": 1.0,
            "residual_background": c.residual_background,
            "features": c.features,
            "scores": c.scores,
            "residual_new": c.residual_new,
        }
        terms = incremental_terms(batch.output, batch.teacher, batch.labels, c.threshold)
        return {name: weights[name] * term for name, term in terms.items()}

    def validation_interval(self, total: int) -> int:
        epoch = max(1, total // self.config.epochs)
        return epoch if epoch > 100 else 5 * epoch

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        return predict_from_small_scores(output.small_logits, size)

    @classmethod
    def lengths(cls, config: Any, index: int, images: int) -> dict[str, Length]:
        return super().lengths(config, index, half(images) if index and config.half_of_the_data else images)

    @classmethod
    def footnotes(cls, config: Any) -> list[str]:
        notes = [*cls.caveats]
        if config.half_of_the_data:
            notes.append("later steps train on half of their images, as each process of the released code")
        if config.ear_statistics == "fresh":
            notes.append("norms of new branches keep mean 0 and variance 1, as in the released code")
        return notes


def half(images: int) -> int:
    """Images of one of two processes: a half, rounded up."""
    return -(-images // 2)
