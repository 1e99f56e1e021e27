"""Adapters of the family ssul: the exemplar memory of SSUL-M."""

import numpy as np
from golden_common import t

from bench.method import replay
from methods.ssul_m import classes_shown


def class_balanced_memory(x, p):
    drawn, sizes = [], []
    for step, names in enumerate(p["image_names"], start=1):
        labels = t(x[f"labels_step{step - 1}"]).long()
        logits = t(x[f"prev_logits_step{step - 1}"]).float() if step > 1 else None
        found = classes_shown(labels, logits, 1 if p["unknown"] else 0, p["pseudo_threshold"])
        candidates = [
            *drawn,
            *(replay.Record(name, classes) for name, classes in zip(names, found, strict=True)),
        ]
        n_old = sum(len(p["tasks"][str(earlier)]) for earlier in range(step))  # with background
        drawn = replay.class_balanced_draw(candidates, range(1, n_old), p["mem_size"], p["numpy_seed"])
        sizes.append(len(drawn))
    return {"memory_sizes": np.array(sizes)}


def replay_batch_mix(x, p):
    batch = {"images": t(x["images"]), "labels": t(x["labels"])}
    memory = {"images": t(x["memory_images"]), "labels": t(x["memory_labels"])}
    mixed = replay.replace_half(batch, memory, t(x["permutation"]))
    return {"images_out": mixed["images"], "labels_out": mixed["labels"]}


ADAPTERS = {"class_balanced_memory": class_balanced_memory, "replay_batch_mix": replay_batch_mix}
