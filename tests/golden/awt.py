"""Adapters of the family awt: attribution, the choice of channels, the new head's initialisation."""

import torch
import torch.nn.functional as F
from golden_common import t

from bench.models.classifier import LinearClassifier
from methods.awt import Attribution, best_channels, transfer_background

SIDE = 32
"""Of the stand-in network's map."""


def features(images, x):
    """The stand-in for the old network: pooled images, a 1x1 convolution, a ReLU."""
    weight = t(x["trunk_weight"])[:, :, None, None]
    return F.relu(F.conv2d(F.adaptive_avg_pool2d(images, SIDE), weight, t(x["trunk_bias"])))


def attribution(x, p, groups):
    side = p["image_size"]
    images, labels = t(x["images"]), t(x["labels"])
    repeat = side // images.shape[-1]
    images = images.repeat_interleave(repeat, -1).repeat_interleave(repeat, -2)
    found = Attribution(t(x["background_weight"]), groups)
    baseline = features(torch.zeros(1, 3, side, side), x)
    found.update(features(images, x), baseline, labels, range(len(images)))
    return found


def channels(x, p):
    scores = attribution(x, p, [p["new_classes"]]).scores()[0]
    return {"channels": best_channels(scores, p["percent"]).byte(), "scores": scores}


def channels_per_class(x, p):
    scores = attribution(x, p, [[c] for c in p["new_classes"]]).scores(accumulated=True)
    return {"channels": best_channels(scores, p["percent"]).byte()}


def classifier_init(x, p):
    classifier = LinearClassifier(x["weight_0"].shape[1], p["classes_per_step"])
    for i, head in enumerate(classifier.heads):
        head.load_state_dict(
            {"weight": t(x[f"weight_{i}"]).flatten(1)[:, :, None, None], "bias": t(x[f"bias_{i}"])}
        )
    transfer_background(classifier, t(x["channels"]))
    heads = [(head.weight.detach().flatten(1), head.bias.detach()) for head in classifier.heads]
    out = {f"weight_{i}_after": weight for i, (weight, _) in enumerate(heads)}
    return out | {f"bias_{i}_after": bias for i, (_, bias) in enumerate(heads)}


ADAPTERS = {
    "awt_channels": channels,
    "awt_channels_per_class": channels_per_class,
    "awt_classifier_init": classifier_init,
}
