"""Adapters of the family chain-nest: NeST around MiB and around PLOP."""

import numpy as np
from golden_chain_mib import MibChain
from golden_common import t

from bench.testing.tensors import in_batches


class NestChain(MibChain):
    """A pre-tuned classifier before the wrapped method trains."""

    settings_of = (
        "distillation", "pod", "pod_logits", "scales", "base_threshold",
        "pretuning_epochs", "pretuning_lr_scale", "freeze_old_classifier",
    )  # fmt: skip
    renamed = {}

    def settings(self, index):
        values = super().settings(index)
        if index:
            start = self.x[f"{self.prefix}new_bias_step_{index}"]
            if (start != start[0]).any():
                raise ValueError(
                    f"step {index}: the new biases start at {start}; NeST starts all at one value"
                )
            values["beta_init"] = float(start[0])
        return values

    def data(self, index):
        if not index:
            return {}
        images, labels = (t(self.x[f"similarity_{kind}_step_{index}"]) for kind in ("images", "labels"))
        return {"whole": in_batches(images, self.p["batch_size"], labels=labels)}

    def outputs(self, index, session, begun):
        return (
            {"thresholds": session.method.state["thresholds"]} if "thresholds" in session.method.state else {}
        )

    def logged(self, steps, index):
        found = super().logged(steps, index)
        if index:
            found["pretuning_losses"] = np.array([sum(line.values()) for line in steps.logged("pre-tuning")])
        return found


def chain(wrapped):
    return lambda x, p: NestChain(f"nest+{wrapped}", x, p, f"chain_nest_{wrapped}.").run()


ADAPTERS = {f"chain_nest_{wrapped}": chain(wrapped) for wrapped in ("mib", "plop")}
