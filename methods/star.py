"""STAR: replay of prototypes instead of images (Chen et al., NeurIPS 2023).

Sigmoid scores without a background class, and a binary cross-entropy of the step's classes only: earlier
classifiers get no gradient. Of each earlier class three things are kept: the direction of its features, their
spread about it, and how long they are. From them features are drawn at each iteration, as many as there would
have been pixels of the class, and serve the new classes as negatives. The features of pixels that the old
network claims are distilled, and the new classes' mean directions are kept off those of earlier ones.

Channel k is the class k+1. Features and labels meet on the grid of the features: the label at the middle of
each cell counts. The variant "m" is STAR-M: a memory of whole images, as DKD-M's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from bench.errors import TrainingError
from bench.lazy import F, at_least_float32, torch
from bench.method import Later, Method, groups, replay
from methods.dkd import DKD, class_bce, foreground_pseudo_labels
from methods.ssul import sigmoid_pseudo_labels

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch, Group, Images

LEAST_LOGIT = 0.5
"""What an old class must exceed to claim a pixel in training: a logit, where tests ask for a score."""
SHARED = 0.5
"""The part of the background that two steps are taken to have in common, where images overlap."""
OF_EACH_CLASS = 0.01
"""The part of the earlier background that is taken to belong to each new class, where images overlap."""

Lengths = Literal["as-published", "one-a-vector"]
Spreads = Literal["as-published", "own"]


# ---- labels on the grid ------------------------------------------------------------------------------------


def on_grid(labels: Tensor, size: Sequence[int]) -> Tensor:
    """The label at the middle of each cell of a grid.

    Args:
        labels: [B, H, W].
        size: (h, w) of the grid.

    Returns:
        [B, h, w]; rows and columns 8, 24, 40, ... of 512.

    Source: spec/star.md section 6, counts; its symbols name the grid.
    """
    rows, columns = (
        torch.arange(n, device=labels.device) * whole // n + whole // n // 2
        for n, whole in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], columns]


def old_predictions(logits_old: Tensor) -> Tensor:
    """The old class of each pixel, or 0 where no logit exceeds LEAST_LOGIT; int64 [B, H, W].

    Args:
        logits_old: [B, F, H, W].

    Source: spec/star.md section 4a.
    """
    best, channel = logits_old.max(dim=1)
    return torch.where(best > LEAST_LOGIT, channel + 1, 0)


# ---- how much is replayed ----------------------------------------------------------------------------------


def counts(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """How many points are background, and how many show each of some classes.

    Args:
        labels: integer, of any shape.
        classes: N labels.

    Returns:
        float64 [1 + N].
    """
    return torch.stack([(labels == c).sum() for c in (0, *classes)]).double()


class ReplayPlan(NamedTuple):
    """How an iteration replays.

    Attributes:
        per_iteration: vectors of each old class, int64 [F].
        background: r, what the background of the batch counts beyond itself.
        counts: points of background and of all classes, for the next step, [1 + F + N].
    """

    per_iteration: Tensor
    background: float
    counts: Tensor


def replay_plan(
    before: Tensor, predicted: Tensor, new: Tensor, iterations: int, overlapped: bool
) -> ReplayPlan:
    """How many vectors of each old class an iteration draws, as many as pixels that the step's images lack.

    Args:
        before: points of background and of each old class, as the previous step handed them on, [1 + F].
        predicted: points of the step's background that the old network leaves there or claims, [1 + F].
        new: points of background and of each new class, [1 + N].
        iterations: of one epoch.
        overlapped: whether images of a step may be those of earlier ones.

    Source: spec/star.md section 6.
    """
    n_new, own = len(new) - 1, predicted[0].item()
    background = before[0].item() * (1 - OF_EACH_CLASS * n_new if overlapped else 1)
    shared = SHARED if overlapped else 0.0
    left = before[1:] - predicted[1:] if overlapped else before[1:]
    ratio = max(0.0, background / own - shared) if own else 0.0
    after = before[1:] if overlapped else before[1:] + predicted[1:]
    first = before.new_tensor([own * (1 - shared) + background])
    return ReplayPlan(
        (left / iterations).trunc().clamp(min=0).long(), ratio, torch.cat([first, after, new[1:].to(before)])
    )


# ---- prototypes --------------------------------------------------------------------------------------------


@dataclass
class Prototypes:
    """What is kept of classes.

    Attributes:
        directions: of their features, length 1; zero for a class that no point showed, [C, D].
        norms: mean and standard deviation of their length, [2, C].
        spreads: deviation of normalised features, channel by channel, [C, D].
    """

    directions: Tensor
    norms: Tensor
    spreads: Tensor


class PrototypeSums:
    """Prototypes of a step's classes, from two passes over features.

    Args:
        classes: of the step, labels.
        old: those of earlier classes; None at step 0.
        spread_about: at step t > 0 the released code takes spreads of the n-th new class about the direction
            of the n-th of all classes ("as-published"), not about its own.

    Source: spec/star.md section 6.
    """

    def __init__(
        self, classes: Sequence[int], old: Prototypes | None = None, spread_about: Spreads = "as-published"
    ) -> None:
        self.classes, self.old, self.spread_about = classes, old, spread_about
        self.dtype = torch.float32
        self.sums: list[Tensor] = []
        self.deviations: list[Tensor] = []

    def _shown(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [P, D] in double precision, and which class each shows, float64 [N, P]."""
        self.dtype = at_least_float32(features).dtype
        flat = features.double().flatten(2).transpose(1, 2).flatten(0, 1)
        at = on_grid(labels, features.shape[2:]).flatten()
        return flat, torch.stack([at == c for c in self.classes]).double()

    def first_pass(self, features: Tensor, labels: Tensor) -> None:
        """Count one batch: features [B, D, h, w], labels int64 [B, H, W]."""
        flat, shown = self._shown(features, labels)
        length = flat.norm(dim=1)
        of_lengths = torch.stack([torch.ones_like(length), length, length.square()])
        _add(self.sums, [shown @ F.normalize(flat, dim=1), of_lengths @ shown.T])

    def end_first_pass(self) -> None:
        """Directions and lengths, over what every process counted.

        Raises:
            TrainingError: there was no batch.
        """
        if not self.sums:
            raise TrainingError("prototypes: the step's images do not fill one batch")
        sums, (points, lengths, squares) = map(_summed, self.sums)
        new = F.normalize(sums, dim=1)
        mean = lengths / points.clamp(min=1)
        variance = (squares - points * mean.square()) / (points - 1).clamp(min=1)
        self.directions = new if self.old is None else torch.cat([self.old.directions.to(new), new])
        self.norms = torch.stack([mean, variance.clamp(min=0).sqrt()])
        self.about = new if self.spread_about == "own" else self.directions[: len(new)]

    def second_pass(self, features: Tensor, labels: Tensor) -> None:
        """Count one batch for the spreads, as in `first_pass`; it may be augmented otherwise."""
        flat, shown = self._shown(features, labels)
        unit = F.normalize(flat, dim=1)
        squares = torch.stack([s @ (unit - p).square() for s, p in zip(shown, self.about, strict=True)])
        _add(self.deviations, [squares, shown.sum(1)])

    def prototypes(self) -> Prototypes:
        """Of all classes so far, those of earlier steps as they were."""
        squares, points = map(_summed, self.deviations)
        norms, spreads = self.norms, (squares / points.clamp(min=1)[:, None]).sqrt()
        if self.old is not None:
            norms = torch.cat([self.old.norms.to(norms), norms], dim=1)
            spreads = torch.cat([self.old.spreads.to(spreads), spreads])
        return Prototypes(*(part.to(self.dtype) for part in (self.directions, norms, spreads)))


def _add(sums: list[Tensor], more: list[Tensor]) -> None:
    """Add to sums in place; nothing is there before the first."""
    sums[:] = [a + b for a, b in zip(sums, more, strict=True)] if sums else more


def _summed(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    from bench.distributed import summed

    return summed(tensor)


def replayed_features(
    prototypes: Prototypes, per_iteration: Sequence[int], direction: Tensor, length: Tensor
) -> Tensor:
    """Features drawn from what is kept of classes: (p + spread g) (deviation h + mean), [V, D].

    Args:
        prototypes: of F classes or more.
        per_iteration: vectors of each of the F classes; V is their sum.
        direction: g, standard normal, [V, D].
        length: h, standard normal, [V, D] as published (each channel has a length of its own), or [V, 1].

    Source: spec/star.md section 4b.
    """
    of = torch.tensor(per_iteration, device=direction.device)
    of = torch.arange(len(of), device=of.device).repeat_interleave(of)
    mean, deviation = prototypes.norms[:, of, None].to(direction)
    aimed = prototypes.directions[of].to(direction) + prototypes.spreads[of].to(direction) * direction
    return aimed * (deviation * length + mean)


# ---- losses ------------------------------------------------------------------------------------------------


def new_class_bce(logits_new: Tensor, labels: Tensor, n_old: int, pos_weight: float) -> Tensor:
    """Binary cross-entropy of the newest channels, [N]: the mean over all pixels; background and ignored
    pixels are negatives.

    Args:
        logits_new: [B, N, H, W].
        labels: int64 [B, H, W].
        n_old: F, classes of earlier steps without background.
        pos_weight: weight of the positive part.

    Source: spec/star.md section 4.
    """
    classes = torch.arange(n_old + 1, n_old + 1 + logits_new.shape[1], device=labels.device)
    return class_bce(logits_new, labels.unsqueeze(1) == classes.view(1, -1, 1, 1), pos_weight)


def with_negatives(
    image: Tensor, replayed: Tensor, background: Tensor, ratio: float, grid_points: int
) -> Tensor:
    """The new classes' losses with those of negatives, weighted as the points that they stand for, [N].

    Args:
        image: losses on the batch, [N].
        replayed: logits of replayed features, [V, N].
        background: logits of the batch at grid points of background, [G, N].
        ratio: r, what each of the G counts.
        grid_points: S, of the batch.

    Source: spec/star.md section 4c and 4d.
    """
    total, weight = image, 1.0
    for logits, each in ((replayed, 1.0), (background, ratio)):
        if len(logits):
            share = each * len(logits) / grid_points
            total = total + share * F.softplus(at_least_float32(logits)).mean(dim=0)
            weight += share
    return total / weight


def feature_distillation(features: Tensor, features_old: Tensor, region: Tensor) -> Tensor:
    """Squared distance of the features in a region, a mean over channels and the region's points.

    Args:
        features, features_old: [B, D, h, w].
        region: [B, 1, H, W], 1 inside; it is resized bilinearly.

    Returns:
        A scalar; 0 without a region, where the released code has 0/0.

    Source: spec/star.md section 4e.
    """
    inside = F.interpolate(region, size=features.shape[2:], mode="bilinear", align_corners=False)
    points = inside.sum()
    distance = (inside * (features - features_old).square()).sum() / features.shape[1]
    return distance / torch.where(points > 0, points, 1.0)


def separation(features: Tensor, labels: Tensor, directions_old: Tensor, n_old: int, n_new: int) -> Tensor:
    """One over the distance of each new class' mean direction to the nearest of the old ones; their mean.

    Args:
        features: [B, D, h, w].
        labels: int64 [B, H, W]; each class' one-hot map is resized bilinearly to the features.
        directions_old: of earlier classes, [F, D]; zero rows are not avoided.
        n_old: F.
        n_new: N. A class that the batch does not show counts 1 and has no gradient.

    Source: spec/star.md section 4f.
    """
    known = directions_old[directions_old.any(dim=1)]
    if not len(known):
        return features.sum() * 0
    classes = torch.arange(n_old + 1, n_old + n_new + 1, device=labels.device).view(1, -1, 1, 1)
    shown = F.interpolate(
        (labels.unsqueeze(1) == classes).to(features.dtype),
        size=features.shape[2:],
        mode="bilinear",
        align_corners=False,
    )
    centre = F.normalize(torch.einsum("bnhw,bdhw->nd", shown, F.normalize(features, dim=1)), dim=1)
    distance = (centre[:, None] - known).norm(dim=2)
    return (1 / distance.min(dim=1).values).mean()


def predict_above_half(logits: Tensor) -> Tensor:
    """The class with the highest score, or background where none exceeds one half; int64 [B, H, W].

    Args:
        logits: [B, C, H, W], channel k the class k+1.

    Source: spec/star.md section 8.
    """
    score, best = torch.sigmoid(logits).max(dim=1)
    return torch.where(score > 0.5, best + 1, 0)


def candidates_pseudo_labels(
    logits_old: Tensor, labels: Tensor, threshold: float, ids: Literal["right", "as-published"] = "right"
) -> Tensor:
    """Labels of a candidate for the memory, old classes where the old network is sure; int64 [B, H, W].

    Args:
        logits_old: [B, F, H, W].
        labels: int64 [B, H, W].
        threshold: least score, inclusive.
        ids: "as-published" passes over the first class and calls each other one by the class before it.

    Source: spec/star.md section 7, M2.
    """
    if ids == "as-published":
        return foreground_pseudo_labels(logits_old, labels, threshold)
    with_background = F.pad(logits_old, (0, 0, 0, 0, 1, 0), value=-torch.inf)
    return sigmoid_pseudo_labels(with_background, labels, 0, threshold)


# ---- the method --------------------------------------------------------------------------------------------


class STAR(DKD):
    """Replayed features as negatives, feature distillation where the old network is sure, separation."""

    title = "STAR"
    paper = "Chen, Cong, Luo, Ip and Kwong, NeurIPS 2023"
    classifier = "foreground"
    caveats = (
        "a batch in which the old network claims no pixel has no distillation, where the released code has "
        "0/0",
        "a class that no point of the features' grid shows is neither replayed nor avoided, where the "
        "released code ends with an error",
    )

    class Config(Method.Config):  # not DKD's: its terms are others
        """Hyper-parameters of STAR."""

        pos_weight: float = Field(4.0, gt=0)
        """Weight of positive pixels in the cross-entropy of the step's classes."""
        newest_lr: Later[float] = Field(10.0, gt=0)
        """Factor on the learning rate for the newest classifier."""
        distillation: Later[float] = Field(5.0, ge=0)
        """Weight of the distillation of features."""
        separation: Later[float] = Field(0.05, ge=0)
        """Weight of the new classes' distance from earlier ones."""
        lengths: Later[Lengths] = "as-published"
        """Whether a replayed feature has one length, or one for each channel as in the released code."""
        spreads: Later[Spreads] = "as-published"
        """About which direction features spread: from the second step on the released code takes that of
        another class; or their own."""
        memory_size: Later[int] = Field(0, ge=0)
        """Images in memory (STAR-M); fewer are kept where there are not so many."""
        memory_threshold: Later[float] = Field(0.9, ge=0, le=1)
        """Least score of a prediction that counts as a class of a candidate for the memory."""
        memory_ids: Later[Literal["right", "as-published"]] = "right"
        """How those predictions are called: by their class, or with the slip of the released code."""

    def heads(self, sizes: Sequence[int]) -> list[int]:
        return [sizes[0] - 1, *sizes[1:]]

    def init_classifier(self) -> None:
        """New classifiers start at random."""

    @property
    def n_old(self) -> int:
        """Classes of earlier steps, without background."""
        return self.step.n_old - 1 if self.step.index else 0

    @property
    def own_classes(self) -> range:
        """Labels of the step's classes."""
        return range(self.n_old + 1, self.step.n_classes)

    def start_step(self) -> None:
        super().start_step()
        images = self.training_images()
        own, batches = self.counted(images)
        if not self.step.index:
            self.state["counts"] = own
            return
        overlapped = self.data.protocol.setting == "overlapped"
        before, claimed = self.previous["counts"].to(own), self.claimed(images)
        plan = replay_plan(before, claimed, own, batches, overlapped)
        self.state["per_iteration"] = plan.per_iteration.tolist()
        self.state["background"] = plan.background
        self.state["counts"] = plan.counts

    def counted(self, images: Images | replay.WithExemplars) -> tuple[Tensor, int]:
        """(Grid points of background and of each of the step's classes in one pass, [1 + N]; batches of all
        processes)."""
        found: list[Tensor] = []
        size = None
        for batch in self.data.stream(epoch=0, images=images):
            size = size or self.grid(batch)
            points = counts(on_grid(batch.labels, size), self.own_classes)
            _add(found, [points, torch.ones_like(points[:1])])
        if not found:
            raise TrainingError("counts: the step's images do not fill one batch")
        points, batches = map(_summed, found)
        return points, int(batches)

    def claimed(self, images: Images | replay.WithExemplars) -> Tensor:
        """Grid points of background that the old network leaves there, or claims for each old class, in one
        pass, [1 + F]."""
        found: list[Tensor] = []
        for batch in self.data.stream(epoch=1, images=images):
            size = batch.teacher.features.shape[2:]
            q = on_grid(old_predictions(batch.teacher.logits), size)
            q = torch.where(on_grid(batch.labels, size) == 0, q, -1)
            _add(found, [counts(q, range(1, self.n_old + 1))])
        return _summed(found[0])

    def grid(self, batch: Batch) -> Sequence[int]:
        """(h, w) of the features of a batch."""
        with torch.no_grad():
            features = (self.teacher or self.network.eval())(batch.images[:1]).features
        return tuple(features.shape[2:])

    def classes_of_candidates(self, batch: Batch) -> Sequence[Sequence[int] | None]:
        c, labels = self.config, batch.labels
        if self.step.index > 1:
            labels = candidates_pseudo_labels(batch.teacher.logits, labels, c.memory_threshold, c.memory_ids)
        return replay.shown_classes(labels)

    def parameter_groups(self) -> list[Group]:
        factors = {"body": self.config.body_lr, "head": 1.0, "classifier": 1.0}
        if self.step.index:
            factors[f"classifier.heads.{self.step.index}"] = self.config.newest_lr
        return groups(self.network, self.config.lr, factors)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        c, n_new = self.config, len(self.own_classes)
        logits = batch.output.logits[:, -n_new:]
        image = new_class_bce(logits, batch.labels, self.n_old, c.pos_weight)
        if not self.step.index:
            return {"bce": image.sum()}
        with torch.autocast(batch.labels.device.type, enabled=False):
            return self.later_losses(batch, image)

    def later_losses(self, batch: Batch, image: Tensor) -> dict[str, Tensor]:
        c, labels, n_new = self.config, batch.labels, len(image)
        features, old = (at_least_float32(o.features) for o in (batch.output, batch.teacher))
        size = features.shape[2:]
        q = old_predictions(batch.teacher.logits)
        background = (on_grid(labels, size) == 0) & (on_grid(q, size) == 0)
        head, kept = self.network.classifier.heads[-1], self.prototypes_before()
        drawn = self.drawn_features(kept, features)
        negative = batch.output.small_logits[:, -n_new:].permute(0, 2, 3, 1)[background]
        total = with_negatives(
            image,
            F.linear(drawn, head.weight.flatten(1), head.bias),
            negative,
            self.state["background"],
            background.numel(),
        )
        region = ((labels == 0) & (q > 0)).unsqueeze(1).to(features.dtype)
        directions = kept.directions.to(features)
        return {
            "bce": total.sum(),
            "pkd": c.distillation * feature_distillation(features, old, region),
            "separation": c.separation * separation(features, labels, directions, self.n_old, n_new),
        }

    def prototypes_before(self) -> Prototypes:
        """Those of earlier steps' classes."""
        return Prototypes(*(self.previous[name] for name in ("directions", "norms", "spreads")))

    def drawn_features(self, kept: Prototypes, like: Tensor) -> Tensor:
        """Replayed features of one iteration, [V, D], class by class from torch's own generator."""
        wide = like.shape[1] if self.config.lengths == "as-published" else 1
        directions, lengths = [like.new_zeros(0, like.shape[1])], [like.new_zeros(0, wide)]
        for n in self.state["per_iteration"]:
            for found, channels in ((directions, like.shape[1]), (lengths, wide)):
                found.append(
                    torch.randn(1, channels, n, 1, device=like.device, dtype=like.dtype)[0, :, :, 0].T
                )
        return replayed_features(kept, self.state["per_iteration"], torch.cat(directions), torch.cat(lengths))

    def end_step(self) -> None:
        sums = PrototypeSums(
            self.own_classes, self.prototypes_before() if self.step.index else None, self.config.spreads
        )
        self.network.eval()
        with torch.no_grad():
            for passed, take in enumerate((sums.first_pass, sums.second_pass)):
                for batch in self.data.stream(epoch=self.config.epochs + passed, images=self.training):
                    take(batch.in_full_precision().output.features, batch.labels)
                if not passed:
                    sums.end_first_pass()
        found = sums.prototypes()
        self.state.update(directions=found.directions, norms=found.norms, spreads=found.spreads)

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        return predict_above_half(output.logits)
