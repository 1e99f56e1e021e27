"""EIR: Enhanced Instance Replay (CVPR 2025, arXiv 2503.22136). A reconstruction: the released code does not
run.

DKD's network, optimiser and test rule, with two other terms: a binary cross-entropy on soft targets over all
channels, and a distillation confined to a region. A memory keeps images on which each class is one connected
instance. They come back twice: as samples cut out of their surroundings, and pasted, half transparent, onto
the background of new images, where they stand for the classes that the old network sees there.

What the code leaves undefined is decided here and declared: `region` and `index` below. Constants that the
code gives for its crop of 512 scale with the crop.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from bench.errors import UserError
from bench.lazy import F, at_least_float32, torch
from bench.method import IGNORE, Later, Method, mix, replay
from methods.dkd import DKD
from methods.ssul import sigmoid_pseudo_labels

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch, Batches, Images, Protocol, Sample

PLACES = 3
"""Places of an image onto which is pasted, and classes that are, at most."""
REGION, REGION_CROP = 250, 512
"""Side of a place, at a crop of this side."""


# ---- losses ------------------------------------------------------------------------------------------------


def one_hot(labels: Tensor, n_classes: int) -> Tensor:
    """Targets float32 [B, C, H, W] of labels int64 [B, H, W]; a label that is no channel, such as 255, gives
    zeros."""
    return (labels.unsqueeze(1) == torch.arange(n_classes, device=labels.device).view(1, -1, 1, 1)).float()


def soft_multi_label_bce(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Binary cross-entropy with soft targets, summed over all channels, on pixels that have a target.

    Args:
        logits, targets: [B, C, H, W]; a pixel whose targets sum to 0 is not learned.
        reduction: "mean" over learned pixels, "sum", or "none": [B, H, W], 0 where not learned.

    Source: spec/eir.md section 5.1.
    """
    learned = targets.sum(dim=1) != 0
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1) * learned
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.masked_select(learned).mean()


def region_distillation(
    logits: Tensor,
    logits_old: Tensor,
    mask: Tensor | None = None,
    index: Literal["fixed", "as_published"] = "fixed",
    alpha: float = 1.0,
) -> Tensor:
    """Distillation in which the old network's background is matched by the new classes, in a region.

    Args:
        logits: [B, C, H, W]; channel 0 counts in the softmax but is matched by nothing.
        logits_old: [B, C_old, H, W] with C_old < C.
        mask: [B, H, W], the region; None for everywhere.
        index: "fixed" sums over all new classes; "as_published" leaves the first of them out, so that one new
            class gives infinity.
        alpha: multiplies the old logits.

    Returns:
        A scalar: divided by C_old, averaged over all pixels, those outside the region among them.

    Source: spec/eir.md section 5.2.
    """
    n_old = logits_old.shape[1]
    logits, logits_old = at_least_float32(logits), at_least_float32(logits_old)
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    new = torch.logsumexp(logits[:, n_old + (index == "as_published") :], dim=1, keepdim=True) - total
    log_p = torch.cat([new, logits[:, 1:n_old] - total], dim=1)
    loss = -(F.softmax(alpha * logits_old, dim=1) * log_p).mean(dim=1)
    return (loss if mask is None else loss * mask).mean()


# ---- pasting -----------------------------------------------------------------------------------------------


def potential_classes(labels: Tensor, pseudo_labels: Tensor, at_most: int = PLACES) -> list[list[int]]:
    """Classes that only the pseudo-labels of an image show, ascending, the first few of them.

    Args:
        labels, pseudo_labels: int64 [B, H, W].
    """
    pairs = zip(replay.shown_classes(labels), replay.shown_classes(pseudo_labels), strict=True)
    return [[c for c in after if c not in before][:at_most] for before, after in pairs]


def background_regions(foreground: Tensor, region_size: int, top: int = PLACES) -> tuple[Tensor, Tensor]:
    """The emptiest windows of a grid.

    Args:
        foreground: [B, H, W], 0 on background.
        region_size: side of a window, and stride of the grid.
        top: how many.

    Returns:
        (row and column of each window's corner, int64 [B, top, 2]; its background pixels, int64 [B, top]),
        emptiest first, ties in the order of the grid.

    Source: spec/eir.md section 5, step 3.
    """
    counts = F.avg_pool2d(
        (foreground == 0).float().unsqueeze(1), region_size, stride=region_size, divisor_override=1
    )
    columns = counts.shape[-1]
    zeros, cell = counts.flatten(1).sort(dim=1, descending=True, stable=True)
    corners = torch.stack([cell // columns, cell % columns], dim=-1) * region_size
    return corners[:, :top], zeros[:, :top].long()


def paste_instance(
    image: Tensor,
    targets: Tensor,
    instance_image: Tensor,
    instance_labels: Tensor,
    instance_class: int,
    share: float,
    place: Sequence[int],
    region_size: int,
) -> None:
    """Blend an instance, scaled to fit a window, into an image and its targets; both are changed in place.

    Args:
        image: float [3, S, S].
        targets: float [C, S, S].
        instance_image, instance_labels: image [3, S, S] and label map [S, S] that show the instance.
        instance_class: which label is pasted; where it has no pixel, or a single row or column, nothing is.
        share: of the instance in the mixture, from 0 to 1.
        place: row and column of the window's corner.
        region_size: side of the window.

    Source: spec/eir.md section 5, step 4.
    """
    mask = instance_labels == instance_class
    rows, columns = mask.any(dim=1).nonzero().flatten().tolist(), mask.any(dim=0).nonzero().flatten().tolist()
    if len(rows) == 0 or rows[0] == rows[-1] or columns[0] == columns[-1]:
        return
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    factor = min(region_size / (columns[-1] - columns[0] + 2), region_size / (rows[-1] - rows[0] + 2))
    if min(mask[box].shape) * factor < 1:  # a thread that scaling makes vanish
        return
    cut = torch.cat([instance_image[:, *box], mask[None, *box]])
    scaled = F.interpolate(cut[None], scale_factor=factor, mode="nearest")[0].to(image.device)
    window = (
        shifted_inside(place[0], scaled.shape[1], image.shape[1]),
        shifted_inside(place[1], scaled.shape[2], image.shape[2]),
    )
    weight = share * scaled[3]
    image[:, *window] = weight * scaled[:3] + (1 - weight) * image[:, *window]
    targets[:, *window] *= 1 - weight
    targets[instance_class, *window] += weight


def shifted_inside(start: int, extent: int, size: int) -> slice:
    """`extent` pixels from `start` on; where they would leave the image, the last that end one pixel before
    its edge."""
    start = size - 1 - extent if start + extent > size else start
    return slice(start, start + extent)


class Paste(NamedTuple):
    """One instance to be pasted: on which image of the batch, which class, from which exemplar in which
    augmentation, how and where."""

    row: int
    instance_class: int
    exemplar: int
    seed: int
    share: float
    place: Sequence[int]


# ---- memory ------------------------------------------------------------------------------------------------


def is_single_component(labels: Any, ignore_index: int = IGNORE) -> bool:
    """Whether each class of a label map (array [H, W]) is one piece, 4-connected; true without any class.

    Source: spec/eir.md section 4 (scipy's default structure).
    """
    import numpy as np
    from scipy import ndimage

    return all(ndimage.label(labels == c)[1] == 1 for c in np.unique(labels) if c not in (0, ignore_index))


def single_instances(labels: Tensor) -> list[list[int] | None]:
    """The classes that each label map (int64 [B, H, W]) shows, or None where one of them is in several
    pieces."""
    return [
        classes if is_single_component(m) else None
        for m, classes in zip(labels.cpu().numpy(), replay.shown_classes(labels), strict=True)
    ]


def stored_only(labels: Any, stored: Sequence[int]) -> Any:
    """Labels (array [H, W]) of stored classes; everything else, void among it, is background."""
    import numpy as np

    return np.where(np.isin(labels, [c for c in stored if c != IGNORE]), labels, 0)


def cut_out(images: Tensor, labels: Tensor) -> Tensor:
    """Normalised images [B, 3, H, W] with every pixel labelled 0 (in int64 [B, H, W]) set to the mean
    colour."""
    return images * (labels != 0).unsqueeze(1)


class Instances:
    """Samples of the images in memory, each labelled with the classes it was stored with and nothing else."""

    def __init__(self, images: Images, stored: Sequence[Sequence[int]]) -> None:
        self.images, self.stored = images, stored

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        sample = self.images[item]
        return (
            sample
            if "error" in sample
            else {**sample, "labels": stored_only(sample["labels"], self.stored[item[0]])}
        )


class EIR(DKD):
    """Soft cross-entropy, region-specific distillation, instance memory and pasting."""

    title = "EIR (reconstruction)"
    paper = "Enhanced Instance Replay, CVPR 2025 (arXiv 2503.22136)"
    caveats = (
        "reconstruction: the released code does not run, so no published number belongs to an executable "
        "state of it",
    )

    class Config(Method.Config):  # not DKD's: none of its terms is used
        """Hyper-parameters of EIR."""

        distillation: Later[float] = Field(5.0, ge=0)
        """Weight of the region-specific distillation."""
        region: Later[Literal["new", "all"]] = "new"
        """Where it acts: on pixels annotated with one of the step's classes, or everywhere. Undefined in the
        released code."""
        index: Later[Literal["fixed", "as_published"]] = "fixed"
        """Which new classes match the old background: all, or all but the first as in the released code (not
        with one new class)."""
        threshold: Later[float] = Field(0.7, ge=0, le=1)
        """Least score of a pseudo-label."""
        memory_size: Later[int] = Field(100, ge=0)
        """Images in memory; fewer are kept where there are not so many."""

    def init_classifier(self) -> None:
        """New classifiers start at random: the auxiliary one is trained on background here, not to say no."""

    def start_step(self) -> None:
        if not self.step.index:
            return
        if self.config.memory_size:
            classes = self.classes_of_candidates
            self.state[replay.STATE] = replay.draw_memory(
                self.data, self.previous, classes, self.config.memory_size
            )

    def classes_of_candidates(self, batch: Batch) -> Sequence[Sequence[int] | None]:
        """What images of the previous step show in a random crop, where each class is one instance; no
        pseudo-labels."""
        return single_instances(batch.labels)

    def training_images(self) -> Images | replay.WithExemplars:
        """The step's images and, where there is a memory, the instances in it."""
        from bench.method import ImageStore

        records = replay.kept(self.state)
        if not records:
            return self.data.train
        images = self.data.images(
            self.step.index, [record.name for record in records], table=self.data.all_seen_table()
        )
        stored = [record.labels for record in records]
        kept = ImageStore(self.data.files["train"], keep=True)  # pasted from again and again
        self.instances = Instances(replace(images, store=kept), stored)
        self.buckets: dict[int, list[int]] = {}
        for position, record in enumerate(records):
            self.buckets.setdefault(record.drawn_for, []).append(position)
        return replay.WithExemplars(self.data.train, Instances(images, stored))

    def batches(self, epoch: int) -> Batches:
        seed = mix(self.data.seed, self.step.index, "paste", epoch, self.data.rank)
        self.generators["paste"] = random.Random(seed)
        return super().batches(epoch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.step.index:
            return {
                "bce": soft_multi_label_bce(batch.output.logits, one_hot(batch.labels, self.step.n_classes))
            }
        if "replayed" in batch.extra:
            replayed = batch.extra["replayed"][:, None, None, None]
            batch = batch.replaced(torch.where(replayed, cut_out(batch.images, batch.labels), batch.images))
        pseudo_labels = sigmoid_pseudo_labels(batch.teacher.logits, batch.labels, 0, self.config.threshold)
        targets = one_hot(pseudo_labels, self.step.n_classes)
        pasted = self.pasted(batch, pseudo_labels, targets)
        region = None
        if self.config.region == "new":
            region = (batch.labels >= self.step.n_old) & (batch.labels != IGNORE)
        return {
            "bce": soft_multi_label_bce(pasted.output.logits, targets),
            "rskd": self.config.distillation
            * region_distillation(pasted.output.logits, pasted.teacher.logits, region, self.config.index),
        }

    def pasted(self, batch: Batch, pseudo_labels: Tensor, targets: Tensor) -> Batch:
        """The batch with instances from memory pasted onto its images; their targets [B, C, H, W] are changed
        in place."""
        size = REGION * self.config.crop // REGION_CROP
        pastes = self.draw_pastes(batch.labels, pseudo_labels, size) if self.memory() else []
        if not pastes:
            return batch
        with ThreadPoolExecutor() as pool:
            instances = list(pool.map(self.instance, pastes))
        images = batch.images.clone()
        for paste, (image, labels) in zip(pastes, instances, strict=True):
            paste_instance(
                images[paste.row],
                targets[paste.row],
                image,
                labels,
                paste.instance_class,
                paste.share,
                paste.place,
                size,
            )
        return batch.replaced(images)

    def instance(self, paste: Paste) -> tuple[Tensor, Tensor]:
        """Normalised image [3, S, S] and labels [S, S] of an exemplar, augmented."""
        from bench.method import normalise

        sample = self.instances[paste.exemplar, paste.seed]
        if "error" in sample:
            raise UserError(sample["error"])
        return normalise(torch.tensor(sample["images"])[None])[0], torch.tensor(sample["labels"])

    def draw_pastes(self, labels: Tensor, pseudo_labels: Tensor, size: int) -> list[Paste]:
        """What is pasted onto each image: an instance of each class that only the old network sees, else of
        random old classes."""
        pastes: list[Paste] = []
        rng = self.generators["paste"]
        places, _ = background_regions(torch.where(pseudo_labels == IGNORE, 0, pseudo_labels), size)
        for row, (classes, corners) in enumerate(
            zip(potential_classes(labels, pseudo_labels), places.tolist(), strict=True)
        ):
            wanted = list(zip(classes, corners, strict=False))
            if len(classes) < 2:
                # All on one place, over each other; and the last old class is never drawn: both as in the
                # released code.
                wanted += [
                    (rng.randint(1, max(1, len(self.step.old) - 1)), corners[0])
                    for _ in range(PLACES - len(classes))
                ]
            for c, place in ((c, place) for c, place in wanted if c in self.buckets):
                exemplar, seed, share = rng.choice(self.buckets[c]), rng.getrandbits(62), rng.random()
                pastes.append(Paste(row, c, exemplar, seed, share, place))
        return pastes

    @classmethod
    def check(cls, config: Any, protocol: Protocol) -> None:
        alone = [t for t, group in enumerate(protocol.groups) if t and len(group) == 1]
        if config.index == "as_published" and alone:
            raise UserError(
                f"{protocol.label}, step {alone[0]}: eir.index = 'as_published' is infinite in a step with "
                "one class; use 'fixed'"
            )

    @classmethod
    def footnotes(cls, config: Any) -> list[str]:
        region = f"region-specific distillation: region {config.region}, index {config.index}"
        return [*super().footnotes(config), region]
