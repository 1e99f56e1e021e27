"""NeST: New claSsifier pre-Tuning (Xie et al., "Early Preparation Pays Off", ECCV 2024).

NeST wraps another method, replaces the initialisation of its new classifier, and changes nothing else. A new
class's row is generated from all old rows: its importances weigh them element by element, its mixing adds
them up. Both start from how much the new class looks like each old one to the old network, and are learned in
a short pre-tuning in which no other weight moves. Then the generated rows are written into the classifier,
and the wrapped method trains as it always does.

The released code is followed, oddities included (spec/nest.md section 8): norms use batch statistics while
pre-tuning, the learning rate is that of the iteration ahead, so the last update is void, and new biases start
from one random number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from bench.errors import UserError
from bench.lazy import F, at_least_float32, torch
from bench.method import Later, Length, Method, Phase, learning_rate
from methods.mib import unbiased_cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch
    from bench.models.classifier import Classifier

GRID = 128
"""Side of the grid on which new and old classes are compared."""
STATE = "nest."
"""Prefix under which a method's state holds the transformation while it is learned."""


class Transformation(NamedTuple):
    """What pre-tuning learns: how C_old old rows of width D become N new rows and a new background row.

    Attributes:
        importance: [N, C_old, D], weights on the elements of the old rows.
        mixing: [N, C_old], weights on the old rows.
        new_bias: [N].
        background_importance: [1, D].
        background_mixing: [1, 1].

    Source: paper, w_c = (M_c * W_old) P_c; spec/nest.md section 1 (the background's own transformation is in
    the code only).
    """

    importance: Tensor
    mixing: Tensor
    new_bias: Tensor
    background_importance: Tensor
    background_mixing: Tensor

    def rows(self, old_weight: Tensor) -> tuple[Tensor, Tensor]:
        """(background row [1, D], new rows [N, D]) generated from old rows [C_old, D], background first."""
        background = self.background_mixing * (self.background_importance * old_weight[:1])
        return background, (self.mixing.unsqueeze(-1) * self.importance * old_weight).sum(dim=1)


class ClassSimilarity:
    """How alike each new class and each old class are, in the old network's features.

    A pixel of a new class counts, for old class c and feature d, with the probability of c if feature and row
    agree in sign, else not.

    Args:
        old_weight: [C_old, D].
        n_new_classes: N.

    Source: spec/nest.md section 3.
    """

    def __init__(self, old_weight: Tensor, n_new_classes: int) -> None:
        self.old_weight = old_weight
        self.sums = old_weight.new_zeros(n_new_classes, *old_weight.shape, dtype=torch.float64)
        self.pixels = old_weight.new_zeros(n_new_classes, dtype=torch.float64)

    def update(self, features: Tensor, logits_old: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Args:
            features: of the old network, [B, D, h, w].
            logits_old: [B, C_old, H', W'].
            labels: int64 [B, H, W].
        """
        f = F.interpolate(
            at_least_float32(features), size=(GRID, GRID), mode="bilinear", align_corners=False
        ).movedim(1, -1)
        p = (
            F.interpolate(
                at_least_float32(logits_old), size=(GRID, GRID), mode="bilinear", align_corners=False
            )
            .softmax(dim=1)
            .movedim(1, -1)
        )
        y = F.interpolate(labels[:, None].float(), size=(GRID, GRID), mode="nearest")[:, 0] - len(
            self.old_weight
        )
        for n in range(len(self.sums)):
            there = y == n
            p_there, f_there = p[there], f[there]
            self.pixels[n] += len(p_there)
            for sign in (
                1,
                -1,
            ):  # sign agrees where both are positive or both negative: one matrix product each
                agreeing = p_there.T @ (sign * f_there > 0).to(p_there.dtype)
                self.sums[n] += agreeing * (sign * self.old_weight > 0)

    def importance(self) -> Tensor:
        """Shares in [0, 1], [N, C_old, D]; NaN for a class without a pixel."""
        return (self.sums / self.pixels[:, None, None]).to(self.old_weight.dtype)

    def mixing(self) -> Tensor:
        """Probabilities over the old classes, [N, C_old]; nearly one-hot for wide features."""
        return self.importance().sum(dim=-1).softmax(dim=1)


def generated_logits(
    features: Tensor, old_weight: Tensor, old_bias: Tensor, transformation: Transformation
) -> Tensor:
    """Logits [B, C, h, w] of features [B, D, h, w] where background and new rows are the generated ones.

    Args:
        old_weight: [C_old, D].
        old_bias: [C_old]; background keeps its bias.
    """
    background, new = transformation.rows(old_weight)
    weight = torch.cat([background, old_weight[1:], new])
    return F.conv2d(features, weight[:, :, None, None], torch.cat([old_bias, transformation.new_bias]))


def pretuning_loss(
    features: Tensor, labels: Tensor, old_weight: Tensor, old_bias: Tensor, transformation: Transformation
) -> Tensor:
    """MiB's unbiased cross-entropy of the generated logits at the labels' size, a mean over all pixels.

    Source: spec/nest.md section 4.
    """
    small = generated_logits(features, old_weight, old_bias, transformation)
    logits = F.interpolate(
        at_least_float32(small), size=labels.shape[-2:], mode="bilinear", align_corners=False
    )
    return unbiased_cross_entropy(logits, labels, len(old_weight))


def finalised_classifier(
    old_weight: Tensor, old_bias: Tensor, transformation: Transformation
) -> tuple[Tensor, Tensor]:
    """(weight [C, D], bias [C]) as the main training starts from them.

    Generated rows take the scale of the old ones: the background row its old norm, the new rows (by one
    factor) their mean norm, and the new biases as a vector the norm of the old biases as a vector.

    Source: spec/nest.md section 5.
    """
    from bench.models.classifier import align_classifier_norm

    background, new = transformation.rows(old_weight)
    background = background * (old_weight[0].norm() / background.norm())
    beta = transformation.new_bias
    weight = align_classifier_norm(torch.cat([background, old_weight[1:], new]), [len(old_weight), len(new)])
    return weight, torch.cat([old_bias, beta * (old_bias.norm() / beta.norm())])


def old_rows(classifier: Classifier) -> tuple[Tensor, Tensor]:
    """(weight [C_old, D], bias [C_old]) of all heads but the newest, without a graph."""
    heads = classifier.heads[:-1]
    weight, bias = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
    return weight.detach().flatten(1), bias.detach()


class NeST(Method):
    """Any method on a linear classifier, its new rows generated from the old ones and pre-tuned."""

    title = "NeST"
    paper = "Xie, Lu, Xiao, Wang, Zhang and Liu, ECCV 2024"
    wraps = ("linear",)
    needs_teacher = True

    class Config(Method.Config):
        """Hyper-parameters of NeST."""

        pretuning_epochs: Later[int] = Field(5, ge=0)
        """Passes over the step's images before the wrapped method trains."""
        pretuning_lr_scale: Later[float] = Field(1.0, gt=0)
        """Learning rate of pre-tuning over that of the step."""
        beta_init: Later[float | None] = None
        """Bias that every new class starts pre-tuning with; None draws it as the bias of a fresh head is
        drawn."""
        freeze_old_classifier: Later[bool] = False
        """Train no head but the newest in the main phase, background included ("fix_pre_cls")."""

    # ---- the initialisation of the new classifier, in place of the wrapped method's ------------------------

    def init_classifier(self) -> None:
        """Begin the transformation with the similarity of new and old classes."""
        beta = self.config.beta_init
        if beta is None:
            bound = 1 / math.sqrt(self.network.classifier.channels)
            beta = torch.empty(()).uniform_(-bound, bound).item()
        importance, mixing = self.similarity()
        start = Transformation(
            importance,
            mixing,
            importance.new_full((self.step.n_new,), beta),
            importance.new_ones(1, importance.shape[-1]),
            importance.new_ones(1, 1),
        )
        self.state.update({STATE + name: tensor for name, tensor in start._asdict().items()})

    def similarity(self) -> tuple[Tensor, Tensor]:
        """Importance and mixing from one pass of the old network over all of the step's augmented images.

        Raises:
            UserError: a new class without a pixel on the grid: it is like nothing.
        """
        from bench.distributed import summed

        found = ClassSimilarity(old_rows(self.network.classifier)[0], self.step.n_new)
        for batch in self.data.stream(whole=True):
            found.update(batch.teacher.features, batch.teacher.logits, batch.labels)
        found.sums, found.pixels = summed(found.sums), summed(found.pixels)
        missing = [self.step.classes[n] for n, pixels in enumerate(found.pixels.tolist()) if not pixels]
        if missing and self.data.smoke is None:
            names = ", ".join(f"{c} ({self.data.protocol.dataset.classes[c]})" for c in missing)
            raise UserError(
                f"{self.data.protocol.label}, step {self.step.index}: class {names} has no pixel on NeST's "
                f"grid of {GRID} x {GRID} in any of the "
                f"{len(self.data.train)} training crops, so its likeness to the old classes is undefined; "
                "use a larger crop or more images"
            )
        # A smoke run sees too few images to meet every class; what it did not meet starts as the mean of the
        # old rows.
        return found.importance().nan_to_num(1.0), found.mixing().nan_to_num(1 / self.step.n_old)

    @property
    def transformation(self) -> Transformation | None:
        """What is being learned; None unless pre-tuning is under way."""
        tensors = {name: self.state.get(STATE + name) for name in Transformation._fields}
        return None if tensors["importance"] is None else Transformation(**tensors)  # type: ignore[arg-type]

    def pretuning_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of the generated rows; with no graph through the network, none of its weights can move."""
        assert self.transformation is not None
        with torch.no_grad():
            features = batch.output.features
        return {
            "ce": pretuning_loss(
                features, batch.labels, *old_rows(self.network.classifier), self.transformation
            )
        }

    def pretuning_rate(self, base: float, iteration: int, total: int) -> float:
        """The schedule is stepped before the optimiser, not after: the last update has learning rate 0."""
        return learning_rate(base, iteration + 1, total, power=self.config.power)

    def finish_pretuning(self) -> None:
        """Write the generated rows into the classifier and drop the transformation."""
        assert self.transformation is not None
        classifier, n_old = self.network.classifier, self.step.n_old
        with torch.no_grad():
            weight, bias = finalised_classifier(*old_rows(classifier), self.transformation)
            first, new = classifier.heads[0], classifier.heads[-1]
            first.weight[0] = weight[0, :, None, None]
            new.weight.copy_(weight[n_old:, :, None, None])
            new.bias.copy_(bias[n_old:])
        for name in Transformation._fields:
            del self.state[STATE + name]

    # ---- around the wrapped method -------------------------------------------------------------------------

    def setup(self) -> None:
        super().setup()
        if self.step.index and self.config.freeze_old_classifier:
            self.network.classifier.heads[:-1].requires_grad_(False)

    def phases(self) -> list[Phase]:
        if not self.step.index:
            return super().phases()
        lr = self.config.lr * self.config.pretuning_lr_scale
        learned = [tensor.requires_grad_() for tensor in self.transformation or ()]
        pretuning = Phase(
            "pre-tuning",
            self.length("pre-tuning"),
            [{"params": learned, "lr": lr}],
            self.pretuning_losses,
            self.pretuning_rate,
            self.optimiser,
            on_end=self.finish_pretuning,
        )
        return [pretuning, *super().phases()]

    @classmethod
    def lengths(cls, config: Any, index: int, images: int) -> dict[str, Length]:
        pretuning = {"pre-tuning": Length(config.pretuning_epochs, images)} if index else {}
        return {**pretuning, **super().lengths(config, index, images)}

    def observe(self) -> None:
        if self.transformation is None:
            super().observe()

    def penalties(self) -> dict[str, Tensor]:
        return super().penalties() if self.transformation is None else {}
