"""What chains of SSUL and DKD share: torchvision's ResNet and ASPP in small, recorded dropout, memory."""

import contextlib

import numpy as np
import torch
from golden_chain import Replayed, all_used
from golden_common import t
from golden_steps import TinyNetwork

from bench.method import replay
from bench.models.heads import Aspp
from bench.models.resnet import TorchvisionResNet
from bench.testing.tensors import GivenImages, in_batches


def tiny_resnet(stem, middle, blocks):
    """torchvision's ResNet of bottleneck blocks in small, dilated by its own rule to output stride 8."""
    from torchvision.models.resnet import Bottleneck, ResNet

    network = ResNet(Bottleneck, [1, 1, 1, 1])
    network.conv1 = torch.nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
    network.bn1 = torch.nn.BatchNorm2d(stem)
    network.inplanes, network.dilation = stem, 1
    for i, width in enumerate(middle):
        layer = network._make_layer(Bottleneck, width, blocks, stride=1 if i == 0 else 2, dilate=i >= 2)
        setattr(network, f"layer{i + 1}", layer)
    return TorchvisionResNet("", network)


def tiny_deeplab(p, blocks, classifier, extra=False):
    """The network of SSUL, and with `extra` of DKD, in a case's sizes."""

    def head(width):
        built = Aspp(width, p["head_width"], p["aspp_dilations"], extra)
        built.aspp.project[-1].p = p["dropout"]
        return built

    return TinyNetwork(lambda: tiny_resnet(p["stem"], p["middle_widths"], blocks), head, classifier)


def our_trunk(name, prefix=""):
    """Our name of a parameter before the classifier; `prefix` stands before that of the head."""
    kind, _, rest = name.removeprefix(prefix).partition(".")
    if kind == "backbone":
        return f"body.{'' if rest.startswith('layer') else 'stem.'}{rest}"
    return (
        f"head.extra.{rest.removeprefix('last_conv.')}"
        if rest.startswith("last_conv.")
        else f"head.aspp.{rest}"
    )


@contextlib.contextmanager
def recorded_dropout(network, masks):
    """The recorded masks in the place of the head's dropout."""
    layers = network.head.aspp.project
    drawn = layers[-1]
    layers[-1] = Replayed(drawn, masks)
    with all_used(layers[-1].masks):
        yield
    layers[-1] = drawn


def memory_seed(p):
    """The run's seed that draws as the case did."""
    return p.get("memory_seed", replay.AUTHORS_SEED) - replay.AUTHORS_SEED


def candidates(x, index, size, **more):
    """The images that a memory is drawn from, by their ids."""
    images, labels, ids = (x[f"candidate_{kind}_step_{index}"] for kind in ("images", "labels", "ids"))
    return GivenImages(tuple(map(str, ids)), in_batches(t(images), size, labels=t(labels), **more))


def memory_ids(session):
    return np.array([int(record.name) for record in replay.kept(session.method.state)])
