"""SSUL: Semantic Segmentation with Unknown Label for Exemplar-based Class-Incremental Learning (Cha et al.,
NeurIPS 2021).

One head a step, sigmoid scores, binary cross-entropy over all channels. Background that a saliency map marks
is labelled "unknown", a class of its own that later classes start from. From step 1 on the trunk and all old
heads are frozen, and old classes in new images come from the previous network's confident predictions.

Channels: 0 unknown, 1 background, k + 1 the k-th class. Labels are shifted by one accordingly. SSUL-M, with a
memory of exemplars, is in ssul_m.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bench.lazy import F, torch
from bench.method import IGNORE, Later, Method

if TYPE_CHECKING:
    from torch import Tensor

    from bench.method import Batch, Group
    from bench.models.classifier import Classifier

UNKNOWN, BACKGROUND = 0, 1


def bce_ignore_multi_head(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = IGNORE,
) -> Tensor:
    """Binary cross-entropy of one-hot labels, summed over all channels.

    Args:
        logits: [B, C, H, W].
        labels: int64 [B, H, W].
        weight: [B, H, W], or None.
        reduction: "mean" over valid pixels, "sum", or "none": [B, H, W], 0 where ignored.
        ignore_index: label that is not learned.

    Returns:
        NaN for "mean" if no pixel is valid, as the mean of nothing.

    Source: spec/ssul.md section 6.
    """
    valid = labels != ignore_index
    targets = F.one_hot(labels.where(valid, 0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1) * valid
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.masked_select(valid).mean()


def sigmoid_pseudo_labels(
    logits_old: Tensor,
    labels: Tensor,
    last_not_foreground: int,
    threshold: float,
    activation: str = "sigmoid",
) -> Tensor:
    """Old classes where the previous network is confident and the label says background or unknown.

    Args:
        logits_old: [B, C_old, H, W]; every channel takes part in the maximum.
        labels: int64 [B, H, W].
        last_not_foreground: highest channel that is no foreground class: 1 with the unknown channel, 0
            without.
        threshold: least score, inclusive.
        activation: "sigmoid", or "softmax" for a network trained with cross-entropy.

    Returns:
        Labels int64 [B, H, W].
    """
    scores = torch.sigmoid(logits_old) if activation == "sigmoid" else torch.softmax(logits_old, dim=1)
    score, predicted = scores.max(dim=1)
    confident = (labels <= last_not_foreground) & (predicted > last_not_foreground) & (score >= threshold)
    return torch.where(confident, predicted, labels)


def encode_labels_unknown(labels: Tensor, salient: Tensor | bool) -> Tensor:
    """Labels for heads with an unknown channel: shifted by one, and salient background becomes unknown.

    Args:
        labels: int64 [B, H, W], 0 background, 255 ignored.
        salient: bool [B, H, W], or True (everywhere: the rule on ADE20K) or False.
    """
    shifted = torch.where(labels == IGNORE, IGNORE, labels + 1)
    return torch.where(
        (shifted == BACKGROUND) & torch.as_tensor(salient, device=labels.device), UNKNOWN, shifted
    )


def unknown_weight_transfer(classifier: Classifier) -> None:
    """The newest head starts as the unknown head: its 3x3 convolution and norm, and its single row for every
    new class."""
    unknown, new = classifier.heads[UNKNOWN], classifier.heads[-1]
    with torch.no_grad():
        for source, target in zip(unknown[:-1], new[:-1], strict=True):
            values = {
                name: value for name, value in source.state_dict().items() if name != "num_batches_tracked"
            }
            target.load_state_dict(values, strict=False)
        new[-1].weight.copy_(unknown[-1].weight.expand_as(new[-1].weight))
        new[-1].bias.copy_(unknown[-1].bias.expand_as(new[-1].bias))


def predict_merge_unknown(logits: Tensor, unknown: bool = True) -> tuple[Tensor, Tensor]:
    """(classes [B, H, W], scores [B, C, H, W]): sigmoid scores, the unknown score added to the
    background's."""
    scores = torch.sigmoid(logits)
    if unknown:
        scores = torch.cat([scores[:, :1] + scores[:, 1:2], scores[:, 2:]], dim=1)
    return scores.argmax(dim=1), scores


class SSUL(Method):
    """Frozen trunk, unknown class, pseudo-labels."""

    title = "SSUL"
    paper = "Cha, Kim, Yoo and Moon, NeurIPS 2021"
    classifier = "conv-heads"

    class Config(Method.Config):
        """Hyper-parameters of SSUL."""

        saliency: Literal["files", "all", "none"] = "files"
        """Which background is unknown: what the saliency maps mark, all of it (the rule on ADE20K), or none.
        Only files give the published method."""
        unknown: bool = True
        """Model the unknown class; without it there is no weight transfer either."""
        threshold: Later[float] = Field(0.7, ge=0, le=1)
        """Least score of a pseudo-label."""
        background_lr: Later[float] = Field(1e-4, ge=0)
        """Factor on the learning rate for the background head after step 0."""

    @property
    def last_not_foreground(self) -> int:
        return BACKGROUND if self.config.unknown else 0

    def heads(self, sizes: Sequence[int]) -> list[int]:
        return [1, 1, sizes[0] - 1, *sizes[1:]] if self.config.unknown else list(sizes)

    @classmethod
    def maps(cls, config: Any) -> tuple[str, ...]:
        return ("saliency",) if config.unknown and config.saliency == "files" else ()

    def init_classifier(self) -> None:
        if self.config.unknown:
            unknown_weight_transfer(self.network.classifier)

    def make_teacher(self, network: Any) -> Any:
        """The trunk is frozen: it is the network's own, and sees a batch once for both."""
        from bench.models.network import Network, with_shared_trunk

        if isinstance(network, Network):
            return with_shared_trunk(network).requires_grad_(False)
        return super().make_teacher(network)

    def setup(self) -> None:
        if self.step.index:
            self.network.requires_grad_(False)
            for head in self.trained_heads():
                for layer in (head[0], head[-1]):  # not the norm between them
                    layer.requires_grad_(True)

    def trained_heads(self) -> list[Any]:
        heads = self.network.classifier.heads
        return [heads[UNKNOWN], heads[BACKGROUND], heads[-1]] if self.config.unknown else [heads[-1]]

    def train_mode(self) -> None:
        from bench.models.abn import norm_layers

        self.network.train()
        if self.step.index:  # dropout stays active, norms keep their statistics
            for norm in norm_layers(self.network):
                norm.eval()

    def parameter_groups(self) -> list[Group]:
        if not self.step.index:
            return super().parameter_groups()
        background = self.network.classifier.heads[BACKGROUND] if self.config.unknown else None
        groups: list[Group] = []
        for head in self.trained_heads():
            factor = self.config.background_lr if head is background else 1.0
            groups.append(
                {"params": [p for p in head.parameters() if p.requires_grad], "lr": self.config.lr * factor}
            )
        return groups

    def encode(self, batch: Batch) -> Tensor:
        """Training labels in the channels of the heads, int64 [B, H, W]."""
        if not self.config.unknown:
            return batch.labels
        if self.config.saliency == "files":
            return encode_labels_unknown(batch.labels, batch.extra["saliency"] > 0)
        return encode_labels_unknown(batch.labels, self.config.saliency == "all")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        labels = self.encode(batch)
        if self.step.index:
            labels = sigmoid_pseudo_labels(
                batch.teacher.logits, labels, self.last_not_foreground, self.config.threshold
            )
        return {"bce": bce_ignore_multi_head(batch.output.logits, labels)}

    def predict(self, output: Any, size: tuple[int, int]) -> Tensor:
        return predict_merge_unknown(output.logits, self.config.unknown)[0]

    @classmethod
    def footnotes(cls, config: Any) -> list[str]:
        notes = [*cls.caveats]
        if not config.unknown:
            notes.append("unknown class not modelled")
        elif config.saliency != "files":
            notes.append(f"no saliency maps: {config.saliency} background is unknown")
        return notes
