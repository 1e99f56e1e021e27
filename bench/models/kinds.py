"""What a network, a body and a classifier are, and the registries that name them. None of it needs torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from bench.errors import UserError
from bench.names import Registry

if TYPE_CHECKING:
    from torch import nn

    from bench.models.abn import Norm
    from bench.models.classifier import Classifier


@runtime_checkable
class NetworkKind(Protocol):
    """How a network is built; what NETWORKS holds. `Assembled` is the usual one."""

    @property
    def says(self) -> str:
        """One line for people."""

    @property
    def weights(self) -> str:
        """Name of its ImageNet weights in torchvision, or "" if it has none there."""

    def carries(self, classifier: str) -> bool:
        """Whether it can be built with that classifier. UserError for a word that no classifier has.

        A network of another make may carry one that only it knows, under a name that CLASSIFIERS lacks.
        """

    def build(self, sizes: Sequence[int], classifier: str, norm: str) -> nn.Module:
        """A freshly initialised network; arguments as those of `build_network`.

        The engine only moves it, saves it and calls it with images. To grow it and to read what it returns is
        the method's affair: methods of the harness expect a `Network`.
        """


@dataclass(frozen=True)
class BodyKind:
    """How a body is built.

    Attributes:
        says: one line for people.
        build: (norm) -> body: images [B, 3, H, W] to (its output [B, D, h, w], one feature map a stage), with
            D as its `out_channels`. A body of patches says in `multiple` which sides it can cut up; one whose
            checkpoints have other keys brings them into its own form in a method `adapt(state)`.
        weights: name of its ImageNet weights in torchvision, or "" if it has none there.
    """

    says: str
    build: Callable[[Norm], nn.Module]
    weights: str = ""


@dataclass(frozen=True)
class ClassTokens:
    """How the class tokens of a mask transformer go with the patch tokens of a body.

    Attributes:
        n_heads: of the attention.
        std: of the truncated normal that class tokens start from.
    """

    n_heads: int
    std: float


@dataclass(frozen=True)
class Assembled:
    """A network of a body, a head and a classifier that grows: a `bench.models.network.Network`.

    Attributes:
        says: one line for people.
        body: of BODIES.
        head: (channels of the body's output, norm) -> head, with an attribute out_channels.
        activated: SSUL's heads on it have activated batch norm (the MiB family); else batch norm and ReLU.
        tokens: what a mask transformer needs, where the head hands on a body's patch tokens; else None.
    """

    says: str
    body: str
    head: Callable[[int, Norm], nn.Module]
    activated: bool = False
    tokens: ClassTokens | None = None

    @property
    def weights(self) -> str:
        """Name of the body's ImageNet weights in torchvision, or "" if it has none there."""
        return BODIES.find(self.body).weights

    def carries(self, classifier: str) -> bool:
        """Whether the classifier finds what it needs here. UserError for an unknown one."""
        return CLASSIFIERS.find(classifier).fits(self)

    def build(self, sizes: Sequence[int], classifier: str, norm: str) -> nn.Module:
        """Body, head and classifier, made in this order."""
        from bench.models.abn import norm_builder
        from bench.models.network import Network

        builder = norm_builder(norm)
        body = BODIES.find(self.body).build(builder)
        head = self.head(width_of(body), builder)
        grown = CLASSIFIERS.find(classifier).build(width_of(head), sizes, self, builder)
        return Network(body, head, grown)


def _fits_all(network: Assembled) -> bool:
    return True


@dataclass(frozen=True)
class ClassifierKind:
    """How a classifier is built.

    Attributes:
        says: one line for people.
        build: (channels of the features, channels of each head, its network, norm) -> classifier.
        fits: whether a network can carry it; all can by default.
        needs: what a network must have to carry it, in words, for errors.
    """

    says: str
    build: Callable[[int, Sequence[int], Assembled, Norm], Classifier]
    fits: Callable[[Assembled], bool] = _fits_all
    needs: str = ""


def width_of(module: nn.Module) -> int:
    """Channels that a body or a head puts out; AttributeError for a module that does not say."""
    return cast(int, module.out_channels)


BODIES: Registry[BodyKind] = Registry("body", "bench.bodies")
CLASSIFIERS: Registry[ClassifierKind] = Registry("classifier", "bench.classifiers")
NETWORKS: Registry[NetworkKind] = Registry("network", "bench.networks")


def _network_of(point: importlib.metadata.EntryPoint) -> NetworkKind:
    kind = point.load()
    if isinstance(kind, type) or not isinstance(kind, NetworkKind):
        wanted = "an Assembled, or an object with says, weights, carries and build"
        raise UserError(
            f"network {point.name!r} ({point.value}): is a {type(kind).__name__}; it must be {wanted}"
        )
    return kind


NETWORKS.of_entry_point = _network_of
