"""FT: fine-tuning. Each step trains the network on its own classes and labels; nothing keeps the old ones.

Its step 0, plain cross-entropy, is that of most methods. It therefore records the importances that EWC, PI and RW need from it;
recording changes no weight.
"""

from __future__ import annotations

from pydantic import Field

from bench.method import Method
from bench.regulariser import Recorder, gradients, named_parameters
from methods.ewc import OnlineFisher
from methods.pi import PathIntegral
from methods.rw import RiemannianWalk


class FT(Method):
    """The lower bound: the defaults of every hook, as they are."""

    title = "FT"

    class Config(Method.Config):
        """What the recorders of step 0 need; EWC and RW have the same hyper-parameters."""

        fisher_alpha: float = Field(0.9, ge=0, le=1)
        """Weight of the new squared gradient in the Fisher information recorded at step 0."""
        walk_interval: int = Field(10, ge=1)
        """Iterations between two updates of RW's score recorded at step 0."""

    def recorders(self) -> list[Recorder]:
        """At step 0, for whoever builds on it."""
        return [] if self.step.index else [kind(self.state, self.config) for kind in (OnlineFisher, PathIntegral, RiemannianWalk)]

    def start_step(self) -> None:
        for recorder in self.recorders():
            recorder.begin(named_parameters(self.network), self.previous)

    def observe(self) -> None:
        for recorder in self.recorders():
            recorder.update(gradients(self.network), named_parameters(self.network))

    def end_step(self) -> None:
        for recorder in self.recorders():
            recorder.finish(named_parameters(self.network))
