"""FT with a frozen body: after step 0 only the head and the classifiers learn."""

from __future__ import annotations

from bench.method import Method


class FTFrozen(Method):
    """Fine-tuning of everything but the body; its norms keep updating their statistics, as all of a training
    network's do."""

    title = "FT, frozen backbone"
    first_step = "ft"
    needs_teacher = False

    def setup(self) -> None:
        if self.step.index:
            self.network.body.requires_grad_(False)
