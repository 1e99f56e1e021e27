"""Jobs of the engine on batches that are given.

Each step's job is planned, opened (`open_job`), tested and published in a results folder of its own; the next
step finds its weights, its state and its teacher there, as in any run. All on the CPU, as recorded.
"""

import contextlib
import json
import tempfile
from typing import Any
from unittest import mock

import torch

from bench.data.index import ClassIndex
from bench.method.registry import method
from bench.models.build import CLASSIFIERS, NETWORKS, width_of
from bench.models.network import Network
from bench.plan.keys import chained
from bench.plan.make import make_plan
from bench.plan.plan import Job
from bench.store.results import Store
from bench.testing.tensors import tensor_data, tensor_protocol
from bench.train import session
from bench.train.job import publish

NETWORK = "golden case"
"""Under this name a chain's network is known while it runs."""


class TinyNetwork:
    """A network kind made of the project's own blocks in a case's sizes.

    Args:
        body, head: functions that build them; the head's takes the body's width.
        classifier: name of the one it carries.
        build_classifier: (width, sizes) -> classifier, where the registered kind has sizes of its own.
    """

    says, weights, activated, tokens = "of a golden case", "", False, None

    def __init__(self, body, head, classifier, build_classifier=None):
        self.body, self.head = body, head
        self.classifier, self.build_classifier = classifier, build_classifier

    def carries(self, classifier):
        return classifier == self.classifier

    def build(self: Any, sizes, classifier, norm):
        body = self.body()
        head = self.head(width_of(body))
        width = width_of(head)
        if self.build_classifier:
            return Network(body, head, self.build_classifier(width, sizes))
        return Network(body, head, CLASSIFIERS.find(classifier).build(width, sizes, self, norm))


class Steps:
    """The jobs of a chain, one after the other, in a results folder that goes when it is closed.

    Args:
        name: of the method, as the registry takes it.
        sizes: channels that each step adds, background in the first.
        images: training images of each step.
        kind: the network.
        seed: of the run.
        background: what 0 means in the data set: "class" or "unlabelled".
    """

    def __init__(self, name, sizes, images, kind, seed=0, background="class"):
        self.name, self.kind, self.seed = name, kind, seed
        self.protocol = tensor_protocol(sizes, background=background)
        shows = [
            1 << group[0] for group, n in zip(self.protocol.groups, images, strict=True) for _ in range(n)
        ]
        names = tuple(f"image {i}" for i in range(len(shows)))
        split = ClassIndex(names, tuple(shows), "0" * 16)
        self.indexes = {self.protocol.dataset.name: {"train": split, "test": split}}
        self.key: Any = None
        self.opened = contextlib.ExitStack()

    def __enter__(self):
        self.store = Store(self.opened.enter_context(tempfile.TemporaryDirectory()))
        self.store.make()
        cpu = mock.patch.object(session, "device_of_this_process", return_value=torch.device("cpu"))
        self.opened.enter_context(cpu)
        self.opened.callback(NETWORKS.remove, NETWORK)  # the kind is known as long as the chain runs
        NETWORKS.add(NETWORK, self.kind)
        return self

    def __exit__(self, *_):
        self.opened.close()

    def job(self, index, settings):
        """The job of step `index` under the settings in force there, after the job published last."""
        values = {"network": NETWORK, **settings}
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        plan = make_plan([self.protocol], [self.name], "small", [self.seed], overrides, indexes=self.indexes)
        part = plan.jobs[plan.chains[0].keys[index]].part
        return Job(chained(part.digest, self.seed, self.key), part, self.seed, self.key)

    def open(self, index, settings, batches, test, **more):
        """The job of step `index`, open on batches; `more` are further attributes of TensorData."""
        record = self.job(index, settings).record(None)
        config = method(record.method).config(**record.settings).at(index)
        data = tensor_data(self.protocol, index, config, batches, test, self.seed, **more)
        self.store.open_work(record, fresh=True)
        return session.open_job(record, self.store, data)

    def publish(self, opened):
        """Test the network of an open job and publish its artifact. Returns the confusion counts."""
        counts = opened.test()
        publish(opened, counts)
        self.key = opened.record.key
        return counts

    def logged(self, phase="training"):
        """Loss terms of each iteration of a phase of the job that was published last."""
        lines = (self.store.artifact(self.key) / "train.jsonl").read_text().splitlines()
        about = ("phase", "epoch", "iteration", "lr")
        found = [json.loads(line) for line in lines]
        return [{k: v for k, v in line.items() if k not in about} for line in found if line["phase"] == phase]

    def score(self, how):
        """What the published metrics of the last job say under a convention."""
        metrics = self.store.metrics(self.key)
        assert metrics is not None
        return metrics.scores[how]
