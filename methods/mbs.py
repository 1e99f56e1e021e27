"""MBS: Mitigating Background Shift in Class-Incremental Semantic Segmentation (Park et al., ECCV 2024).

A vision transformer whose decoder reads one token a class; every step adds tokens. Everything trains in every
step. Against the background shift: background pixels that the old network believes to be some old class, but
is not sure which, are not learned; patches are held to the old network's features in the measure in which
they are still background; where a new class stands, the old network's background score is handed to that
class before its output is distilled; and a new class's token starts as the background's and is pushed away
from all others.

Classes are positions in the protocol's order throughout. The released code compares raw class ids with
positions in two places, which is the same only in the standard class order (spec/mbs.md section 7, B1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from bench.lazy import F, at_least_float32, torch
from bench.method import IGNORE, Later, Method

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch, Output
    from bench.models.classifier import Classifier


def selective_pseudo_labels(
    logits_old: Tensor, labels: Tensor, threshold: float, ignore_index: int = IGNORE
) -> Tensor:
    """Background pixels take the old network's class where it is sure, and are ignored where it only says
    "not background".

    Args:
        logits_old: [B, C_old, H, W].
        labels: int64 [B, H, W], 0 background.
        threshold: least probability of a pseudo-label, inclusive.
        ignore_index: label that is not learned.

    Returns:
        Labels int64 [B, H, W]. A pixel is ignored where no class reaches the threshold and all old classes
        together are more probable than background.

    Source: spec/mbs.md section 5, 1 and 2.
    """
    probabilities = torch.softmax(logits_old, dim=1)
    score, predicted = probabilities.max(dim=1)
    background = labels == 0
    labels = torch.where(background & (predicted > 0) & (score >= threshold), predicted, labels)
    doubtful = probabilities[:, 0] < probabilities[:, 1:].sum(dim=1)
    return labels.masked_fill((labels == 0) & doubtful, ignore_index)


def feature_distillation_weight_map(
    masks_old: Tensor, labels: Tensor, step_classes: Sequence[int], ignore_index: int = IGNORE
) -> Tensor:
    """How much each patch is held to the old network's features.

    Args:
        masks_old: the old network's logits at patch resolution, [B, C_old, h, w].
        labels: pseudo-labelled map at patch resolution, float [B, h, w].
        step_classes: positions of the step's classes.
        ignore_index: label that is not learned.

    Returns:
        [B, h, w]: the old network's probability of background on background, 1 on old classes, 0 on the
            step's classes and where ignored.

    Source: spec/mbs.md section 5, 3.
    """
    background = torch.softmax(masks_old, dim=1)[:, 0]
    weights = torch.where(labels == 0, background, 1.0)
    excluded = torch.tensor([*step_classes, ignore_index], device=labels.device, dtype=labels.dtype)
    return weights.masked_fill(torch.isin(labels, excluded), 0.0)


def adaptive_feature_distillation(
    features: Tensor, features_old: Tensor, weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Squared distance of features, weighted token by token.

    Args:
        features, features_old: [B, N, D].
        weights: [B, N], or None for the plain squared distance.
        reduction: "mean" over the elements whose weight is above 0 (their number, not the sum of the weights,
            is the divisor), "sum", or "none": [B, N, D].

    Returns:
        For "mean" without any weight above 0 the released code has 0 / 0; here it is 0: nothing to hold, no
        loss.

    Source: spec/mbs.md section 5, 3.
    """
    distance = F.mse_loss(at_least_float32(features), at_least_float32(features_old), reduction="none")
    counted = torch.tensor(distance.numel())
    if weights is not None:
        distance = distance * weights.unsqueeze(-1)
        counted = (weights > 0).sum() * distance.shape[-1]
    if reduction == "none":
        return distance
    return distance.sum() if reduction == "sum" else distance.sum() / counted.clamp(min=1)


def label_guided_output_distillation(
    logits: Tensor, logits_old: Tensor, labels: Tensor, alpha: float = 1.0
) -> Tensor:
    """Distillation of the old network's output, in which its background goes to the new class where the
    ground truth shows one.

    Args:
        logits: [B, C, H, W].
        logits_old: [B, C_old, H, W].
        labels: ground truth of the step (not pseudo-labelled), int64 [B, H, W].
        alpha: multiplies the old logits.

    Returns:
        A scalar: cross-entropy averaged over all pixels, ignored ones included, and divided by C.

    Source: spec/mbs.md section 5, 4.
    """
    n, n_old = logits.shape[1], logits_old.shape[1]
    old = torch.softmax(alpha * logits_old, dim=1)
    heir = torch.where(
        (labels >= n_old) & (labels < n), labels, 0
    )  # the channel that inherits the background's score
    inherited = old.new_zeros(logits.shape).scatter(1, heir.unsqueeze(1), old[:, :1])
    target = torch.cat([inherited[:, :1], old[:, 1:], inherited[:, n_old:]], dim=1)
    return -(target * F.log_softmax(logits, dim=1)).mean()


def class_token_orthogonality(class_tokens: Tensor, n_old: int, weight: float) -> Tensor:
    """Mean absolute cosine between each new class token and every other token; only the new ones feel it.

    Args:
        class_tokens: the parameters, [B, C, D]; repeating them over a batch changes nothing.
        n_old: position of the first new class.
        weight: multiplies the mean; MBS has |new classes| / C.

    Returns:
        A scalar: the mean over the cosines that are not exactly 0.

    Source: spec/mbs.md section 5, 5.
    """
    tokens = class_tokens / class_tokens.norm(dim=-1, keepdim=True)
    cosine = tokens[:, n_old:] @ tokens.detach().transpose(1, 2)
    position = torch.arange(tokens.shape[1], device=tokens.device)
    cosine = cosine.masked_fill(position[n_old:, None] == position, 0.0).abs()
    return weight * cosine.sum() / (cosine > 0).sum().clamp(min=1)


def mbs_incremental_loss(
    new: Output,
    old: Output,
    labels: Tensor,
    step_classes: Sequence[int],
    output_distillation: float,
    threshold: float,
    ignore_index: int = IGNORE,
) -> tuple[dict[str, Tensor], Tensor]:
    """All loss terms of a later step.

    Args:
        new, old: outputs of the network and of the old network, of a mask transformer.
        labels: ground truth of the step, int64 [B, H, W].
        step_classes: positions of the step's classes, ascending and last.
        output_distillation: weight of the output distillation.
        threshold: least probability of a pseudo-label.
        ignore_index: label that is not learned.

    Returns:
        (weighted terms, pseudo-labels int64 [B, H, W]).

    Source: spec/mbs.md section 5.
    """
    targets = selective_pseudo_labels(old.logits, labels, threshold, ignore_index)
    small = F.interpolate(
        targets.unsqueeze(1).float(), size=old.small_logits.shape[-2:], mode="nearest"
    ).squeeze(1)
    weights = feature_distillation_weight_map(old.small_logits, small, step_classes, ignore_index).flatten(1)
    class_features_old = old.extra["class_features"]
    n, n_old = new.logits.shape[1], class_features_old.shape[1]
    terms = {
        "ce": F.cross_entropy(new.logits, targets, ignore_index=ignore_index),
        "patches": adaptive_feature_distillation(new.extra["patches"], old.extra["patches"], weights),
        "tokens": adaptive_feature_distillation(new.extra["class_features"][:, :n_old], class_features_old),
        "output": output_distillation * label_guided_output_distillation(new.logits, old.logits, labels),
        "orthogonality": class_token_orthogonality(
            new.extra["class_tokens"][:1], step_classes[0], len(step_classes) / n
        ),
    }
    return terms, targets


def background_token_transfer(classifier: Classifier) -> None:
    """Each token of the newest head starts as the background's; its mask norm keeps scale 1 and shift 0.

    Source: spec/mbs.md section 2.
    """
    with torch.no_grad():
        classifier.heads[-1].tokens.copy_(classifier.heads[0].tokens.expand_as(classifier.heads[-1].tokens))


class MBS(Method):
    """Selective pseudo-labels, adaptive feature distillation, label-guided output distillation, orthogonal
    class tokens."""

    title = "MBS"
    paper = "Park et al., ECCV 2024"
    classifier = "mask-transformer"
    validations = 10
    caveats = (
        "needs a vision transformer with a decoder that reads class tokens, so its network is not the other "
        "methods'",
    )

    class Config(Method.Config):
        """Hyper-parameters of MBS."""

        threshold: Later[float] = Field(0.7, ge=0, le=1)
        """Least probability of a pseudo-label."""
        output_distillation: Later[float] = Field(25.0, ge=0)
        """Weight of the label-guided output distillation; the loss is a mean over all C classes, so this is
        25 / C a pixel."""

    def heads(self, sizes: Sequence[int]) -> list[int]:
        return [1, sizes[0] - 1, *sizes[1:]]

    def init_classifier(self) -> None:
        background_token_transfer(self.network.classifier)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.step.index:
            return {"ce": F.cross_entropy(batch.output.logits, batch.labels, ignore_index=IGNORE)}
        new_classes = range(self.step.n_old, self.step.n_classes)
        c = self.config
        return mbs_incremental_loss(
            batch.output, batch.teacher, batch.labels, new_classes, c.output_distillation, c.threshold
        )[0]

    @classmethod
    def footnotes(cls, config: Any) -> list[str]:
        notes = [*cls.caveats]
        if config.pretrained == "imagenet":
            notes.append(
                "encoder starts from torchvision's ImageNet-1k weights at 224 pixels, the authors' from "
                "ImageNet-21k weights at 384"
            )
        return notes
