"""UCD: Uncertainty-aware Contrastive Distillation (Yang et al., TPAMI 2022), on MiB. A reconstruction.

Features of one class attract each other and are pushed from those of other classes, over the pixels of a
batch, those of the old network included; a pair counts as much as the old network is certain that both are of
one class.

The released code does not run beyond step 0 and its documented command is refused (spec/ucd.md section 0).
What can be executed of it is followed here, oddities included; `ucd@corrected` has what was meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from bench.errors import UserError
from bench.lazy import F, at_least_float32, torch
from bench.method import IGNORE, Later
from methods.mib import MiB

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch, Protocol

HIGHEST = 20
"""The highest label that the released code knows."""
Pairing = Literal["as-published", "corrected"]


def attention(x: Tensor) -> Tensor:
    """A map weighted at each position by its energy there, relative to the image's.

    Args:
        x: [B, D, h, w].

    Returns:
        [B, D, h, w]; the weight has no gradient.

    Source: spec/ucd.md section 1.
    """
    energy = x.detach().square().sum(dim=1, keepdim=True)
    return x * energy / torch.linalg.vector_norm(energy, dim=(1, 2, 3), keepdim=True)


class Pairs(NamedTuple):
    """Anchors, contrasts, and how much each pair counts.

    Attributes:
        anchor_labels: int64 [A].
        contrast_labels: int64 [K]: those of the anchors, then those of the old network's vectors.
        anchors: [A, D], of length 1.
        contrasts: [K, D], without gradient.
        joint: [A, K]: the old network's probability that both are of one class; 1 for two new ones.
    """

    anchor_labels: Tensor
    contrast_labels: Tensor
    anchors: Tensor
    contrasts: Tensor
    joint: Tensor


def contrastive_pairs(
    features: Tensor,
    features_old: Tensor,
    logits_old: Tensor,
    labels: Tensor,
    pairing: Pairing = "as-published",
) -> Pairs | None:
    """The pairs of a batch.

    As published, labels are resized as if they were amounts and cut to whole numbers, so that other classes
    appear at borders; those above 20 become background, and classes from the lowest label of the batch on
    count as new. Corrected, labels are resized to the nearest, and new are those that the old network does
    not have.

    Args:
        features, features_old: [B, D, h, w].
        logits_old: [B, C_old, h, w].
        labels: int64 [B, H, W].
        pairing: which.

    Returns:
        None if no pixel of the batch shows a new class.

    Source: spec/ucd.md section 1, steps 1 to 4.
    """
    size = features.shape[-2:]
    amounts = labels[:, None].to(features.dtype)
    if pairing == "as-published":
        small = F.interpolate(amounts, size=size, mode="bilinear", align_corners=False)[:, 0].long()
        small = torch.where((small < 0) | (small > HIGHEST), 0, small)
    else:
        small = F.interpolate(amounts, size=size, mode="nearest")[:, 0].long()
        small = torch.where((small < logits_old.shape[1]) | (small == IGNORE), 0, small)
    new = small > 0
    if not new.any():
        return None
    first_new = int(small[new].min()) if pairing == "as-published" else logits_old.shape[1]
    known = torch.where(new, small, logits_old.argmax(dim=1))
    anchor, old = known > 0, (known > 0) & ~new
    u, v, p = (x.permute(0, 2, 3, 1) for x in (features, features_old.detach(), logits_old.softmax(dim=1)))
    anchors = F.normalize(u[anchor], dim=1)
    contrasts = torch.cat([anchors.detach(), F.normalize(v[old], dim=1)])
    anchor_labels, contrast_labels = known[anchor], torch.cat([known[anchor], known[old]])
    joint = p[anchor] @ torch.cat([p[anchor], p[old]]).T
    both = (anchor_labels[:, None] >= first_new) & (contrast_labels >= first_new)
    return Pairs(anchor_labels, contrast_labels, anchors, contrasts, torch.where(both, 1.0, joint).detach())


def contrastive_loss(pairs: Pairs, temperature: float = 0.07, pairing: Pairing = "as-published") -> Tensor:
    """Contrastive loss of anchors, each positive pair weighted by `joint`.

    As published, the scores of negatives are not shifted by the highest as those of positives are.

    Returns:
        A scalar: the mean over anchors that have a positive; 0 if none has.

    Source: spec/ucd.md section 1, step 5.
    """
    scores = pairs.anchors @ pairs.contrasts.T / temperature
    shifted = scores - scores.detach().max(dim=1, keepdim=True).values
    same = pairs.anchor_labels[:, None] == pairs.contrast_labels
    positive = same.clone()
    positive.fill_diagonal_(False)
    against = (torch.exp(scores if pairing == "as-published" else shifted) * ~same).sum(dim=1, keepdim=True)
    log_share = shifted - torch.log(torch.exp(shifted) + against)
    n = positive.sum(dim=1)
    if not n.any():
        return scores.new_zeros(())
    each: Tensor = -(positive * pairs.joint * log_share).sum(dim=1)[n > 0] / n[n > 0]
    return each.mean()


class UCD(MiB):
    """MiB, and a contrastive distillation of features, weighted by the old network's certainty."""

    title = "UCD (reconstruction)"
    paper = "Yang, Fini, Xu, Rota, Ding, Nabi, Alameda-Pineda and Ricci, TPAMI 2022"
    caveats = (
        "a reconstruction: the released code does not run beyond step 0, and no script of it is there",
        "the first classifier is frozen after step 0; the released code freezes it at step 0 as well, as it "
        "was drawn",
    )

    class Config(MiB.Config):
        """Hyper-parameters of UCD."""

        contrast: Later[float] = Field(0.01, ge=0)
        """Weight of the contrastive distillation."""
        temperature: Later[float] = Field(0.07, gt=0)
        """Of that distillation."""
        pairing: Later[Pairing] = "as-published"
        """How labels are resized, which classes count as new and which scores are shifted: as the released
        code does, or as it was meant."""

    def setup(self) -> None:
        super().setup()
        if self.step.index:
            self.network.classifier.heads[0].requires_grad_(False)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().losses(batch)
        if self.step.index:
            terms["contrast"] = self.config.contrast * self.contrastive(batch)
        return terms

    def contrastive(self, batch: Batch) -> Tensor:
        """The contrastive distillation of a batch; 0 without a pixel of a new class."""
        new, old, c = batch.output, batch.teacher, self.config
        with torch.autocast(batch.labels.device.type, enabled=False):
            features, features_old = (attention(at_least_float32(x.features)) for x in (new, old))
            small = at_least_float32(old.small_logits)
            pairs = contrastive_pairs(features, features_old, small, batch.labels, c.pairing)
            if pairs is None:
                return new.logits.new_zeros(())
            return contrastive_loss(pairs, c.temperature, c.pairing)

    @classmethod
    def check(cls, config: Any, protocol: Protocol) -> None:
        super().check(config, protocol)
        n = len(protocol.dataset.classes) - 1
        if config.pairing == "as-published" and n > HIGHEST:
            what = f"labels above {HIGHEST} are background there, {protocol.dataset.name} has {n} classes"
            raise UserError(f"pairing = 'as-published': {what}; use the variant ucd@corrected")
