"""Whole chains of steps, recorded from the authors' trainers, through the engine's own way of doing a job.

Given are only the batches, the first weights, the newest heads as they were drawn, and what the authors' code
drew at random inside its networks; everything else each step finds in what the one before it published.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
from golden_common import t
from golden_steps import Steps

from bench.data.augment import MEAN, STD
from bench.score.conventions import convention
from bench.train.selection import BestOnTest

LAYOUT = ("weight_order", "weight_shapes", "classes_per_step", "iterations_per_step", "background")
"""Parameters of a case that are no setting, in every family."""
COMMON = ("crop", "batch_size", "weight_decay", "momentum", "selection")
"""Parameters that are settings under the same name, in every family."""


def number(value):
    """A number of metrics.json: null is NaN."""
    return np.nan if value is None else value


class Chain:
    """One case: its arrays, its parameters, and what its family says of itself (in a class of its own).

    Attributes:
        settings_of: parameters that are settings of the method under the same name.
        renamed: names of settings by parameter.
        other: parameters that the family's class reads itself.
        convention: by which the case is scored; `scale` is that of its IoU.
    """

    settings_of = ()
    renamed = {}
    other = ()
    convention = "default"
    scale = 1.0

    def __init__(self, name, x, p, prefix=""):
        self.name, self.x, self.p, self.prefix = name, x, p, prefix
        known = (*COMMON, "epochs", "first_epochs", "poly_power", "validation_interval")
        means = {"normalise_mean": list(MEAN), "normalise_std": list(STD)}
        wrong = [k for k, v in means.items() if list(p.get(k, v)) != v]
        mine = {*LAYOUT, *means, *known, *self.settings_of, *self.renamed, *self.other}
        wrong += sorted(set(p) - mine)
        if wrong:
            raise ValueError(f"the chain of {name!r} knows no {wrong[0]} = {p[wrong[0]]!r}")
        self.sizes = p["classes_per_step"]

    # ---- what a family says of itself ----------------------------------------------------------------------

    def kind(self):
        """The network."""
        raise NotImplementedError

    def ours(self, name):
        """Our name of a parameter or buffer of the authors'."""
        raise NotImplementedError

    def seed(self):
        return 0

    def settings(self, index):
        """The settings in force at step `index`, beside those of all families."""
        return {}

    def maps(self, index):
        """What the batches of a step carry beside images and labels, [iterations, batch, …] by name."""
        return {}

    def data(self, index):
        """Further attributes of TensorData."""
        return {}

    def stand_ins(self, index, session):
        """Put what was recorded in the place of what is drawn; a context manager."""
        return contextlib.nullcontext()

    def outputs(self, index, session, begun):
        """Further outputs of a step by name; `begun` are the weights that it began with."""
        return {}

    # ---- the engine's part ---------------------------------------------------------------------------------

    def all_settings(self, index):
        names = {name: name for name in (*COMMON, *self.settings_of)} | {"poly_power": "power"} | self.renamed
        values = {ours: self.p[theirs] for theirs, ours in names.items() if theirs in self.p}
        epochs = {"epochs": self.epochs(1), "first_epochs": self.epochs(0)}
        return {"precision": "fp64", **epochs, **values, **self.settings(index)}

    def epochs(self, index):
        return self.p["epochs"] if index else self.p.get("first_epochs", self.p["epochs"])

    def batches(self, index):
        """The training batches of a step, epoch by epoch."""
        arrays = {
            "images": self.x[f"images_step_{index}"],
            "labels": self.x[f"labels_step_{index}"],
            **self.maps(index),
        }
        n = self.p["iterations_per_step"][index]
        if n % self.epochs(index) or any(len(values) != n for values in arrays.values()):
            raise ValueError(f"step {index}: {n} iterations, {len(arrays['images'])} batches")
        return [{name: t(values[i]) for name, values in arrays.items()} for i in range(n)]

    def shows(self, index):
        """Classes that each test image shows in its whole mask; all, where the authors counted each image."""
        if "test_classes" in self.x:
            return [np.flatnonzero(row).tolist() for row in self.x["test_classes"]]
        return [range(sum(self.sizes))] * len(self.x[f"test_images_step_{index}"])

    def names(self, session):
        """(the authors' name, ours) of each weight that there is at this step, in the order of the record."""
        there = session.method.network.state_dict()
        return [
            (theirs, self.ours(theirs)) for theirs in self.p["weight_order"] if self.ours(theirs) in there
        ]

    def put(self, session, names, values):
        """Fill weights from one vector in the order of the names."""
        there, at = session.method.network.state_dict(), 0
        for _, name in names:
            n = there[name].numel()
            there[name].copy_(t(values[at : at + n]).view_as(there[name]))
            at += n
        if at != len(values):
            raise ValueError(f"{len(values)} weights are recorded, and the network has {at}")

    def taken(self, session, names):
        """The weights as one vector, float64."""
        there = session.method.network.state_dict()
        return torch.cat([there[name].flatten().double() for _, name in names]).clone()

    def run(self):
        """Every step through the engine. Returns the outputs by the manifest's names."""
        out, before = {}, []
        n_images = [
            n // self.epochs(i) * self.p["batch_size"] for i, n in enumerate(self.p["iterations_per_step"])
        ]
        background = self.p.get("background", "class")
        with Steps(self.name, self.sizes, n_images, self.kind(), self.seed(), background) as steps:
            for index in range(len(self.sizes)):
                test = t(self.x[f"test_images_step_{index}"]), t(self.x[f"test_labels_step_{index}"])
                more = {"shows": self.shows(index), **self.data(index)}
                with steps.open(
                    index, self.all_settings(index), self.batches(index), test, **more
                ) as session:
                    names = self.names(session)
                    new = [name for name in names if name not in before]
                    self.put(session, new, self.x[f"new_head_step_{index}" if index else "initial_weights"])
                    begun, before = self.taken(session, names), names
                    with self.stand_ins(index, session), validations() as scores:
                        session.train()
                    if "selection" in self.p:
                        self.check_interval(index, session)
                        found = {"validation_scores": np.array(scores)}
                    else:
                        found = {}
                    found |= {
                        "weights_after": self.taken(session, names),
                        **self.outputs(index, session, begun),
                    }
                    found |= self.tested(session, steps, test[0])
                found |= self.logged(steps, index)
                out |= {f"{name}_step_{index}": value for name, value in found.items()}
            out |= self.means(steps)
        return {f"{self.prefix}{name}": value for name, value in out.items()}

    def tested(self, session, steps, images):
        """Logits at every fourth pixel, confusion and IoU of the published job."""
        network = session.method.network.eval()
        with torch.no_grad():
            batch = session.trainer.batch({"images": images, "labels": torch.zeros(len(images))})
            logits = network(batch.images).logits[:, :, ::4, ::4]
        counts = steps.publish(session)
        matrix = counts.matrix(convention(self.convention), session.data.protocol.dataset, session.data.step)
        score = steps.score(self.convention)
        iou = np.array([number(value) for value in score.iou])
        return {
            "test_logits": logits, "confusion": matrix,
            "class_iou": self.scale * iou, "mean_iou": self.scale * number(score.all),
        }  # fmt: skip

    def check_interval(self, index, session):
        """Complain if the engine's interval of validations is not the case's."""
        interval = session.method.validation_interval(self.p["iterations_per_step"][index])
        if interval != self.p["validation_interval"]:
            raise ValueError(
                f"the engine validates every {interval} iterations, not {self.p['validation_interval']}"
            )

    def logged(self, steps, index):
        """Losses as the job's log has them, penalties apart."""
        terms = steps.logged()
        losses = [sum(value for name, value in line.items() if name != "penalty") for line in terms]
        found = {"losses": np.array(losses)}
        if index and self.p.get("penalty"):
            found["penalties"] = np.array([line["penalty"] for line in terms])
        return found

    def means(self, steps):
        """Means over old and new classes after the last step."""
        score = steps.score(self.convention)
        return {
            "mean_iou_old": self.scale * number(score.old),
            "mean_iou_new": self.scale * number(score.new),
        }


@contextlib.contextmanager
def validations():
    """The scores of the engine's validations, one after the other."""
    scores, validate = [], BestOnTest.validate

    def noted(best):
        scores.append(validate(best))
        return scores[-1]

    with mock.patch.object(BestOnTest, "validate", noted):
        yield scores


class Replayed(torch.nn.Module):
    """Recorded dropout in the place of the layer that draws its own.

    Args:
        layer: the dropout whose place it takes.
        masks: what each training pass kept, [passes, batch, …].
    """

    def __init__(self, layer, masks):
        super().__init__()
        self.p, self.masks = layer.p, iter(masks)

    def forward(self, x):
        return x * t(next(self.masks)).to(x.dtype) / (1 - self.p) if self.training else x


@contextlib.contextmanager
def all_used(masks):
    """Complain if training left recorded masks over."""
    yield
    if next(masks, None) is not None:
        raise AssertionError("fewer training passes than recorded masks")
