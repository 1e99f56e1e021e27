"""The measured numbers of a report as one tidy table."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from bench.report.collect import Result, Section
from bench.score.conventions import CONVENTIONS, Convention
from bench.score.counts import read_counts
from bench.score.iou import old_new_all, score

COLUMNS = (
    "protocol", "data_set", "setting", "data", "track", "network", "method", "title", "memory", "device",
    "torch", "driver", "changed", "seed", "step", "steps", "convention", "quantity", "channel", "class",
    "value", "key",
)  # fmt: skip
"""Of the tidy table and report.csv. `value` is in percent; `key` names the jobs behind it."""


def numbers(sections: Iterable[Section]) -> pd.DataFrame:
    """Every measured number, one a row, with the columns COLUMNS: all conventions, steps and seeds.

    Quantities are "old", "new" and "all" after each step, "iou" of each class, and "avg" (in the row of
    the last step) where every step is there. What a convention leaves out has no row. Old and new
    follow the protocol's steps for every method, also one that learns all classes at once. A convention
    that came after the test is computed from the test's counts.
    """
    known, _ = CONVENTIONS.everything()
    rows: list[tuple[object, ...]] = []
    for section in sections:
        about = (section.name, section.data_set, section.setting, section.data, section.track)
        for chain in section.chains:
            for seed, results in chain.by_seed.items():
                names = dict.fromkeys((*results[-1].metrics.scores, *known))
                for name in (
                    name for name in names if name in known
                ):  # a package that brought one may be gone
                    everywhere = []
                    for result in results:
                        who = (result.network, chain.label, chain.title, result.memory)
                        ran = result.ran
                        on = (ran.device_kind, ran.torch, ran.driver or "", " ".join(result.change.files))
                        where = (*about, *who, *on, seed, result.step, chain.steps, name)
                        iou = _iou(result, name, known[name])
                        means = old_new_all(iou, section.n_first, known[name])
                        everywhere.append(means["all"])
                        for quantity, value in means.items():
                            rows.append((*where, quantity, None, None, 100 * value, result.key))
                        for channel, value in enumerate(iou):
                            title = result.metrics.classes[channel]
                            rows.append((*where, "iou", channel, title, 100 * value, result.key))
                    if len(results) == chain.steps > 1:
                        keys = " ".join(result.key for result in results)
                        rows.append((*where, "avg", None, None, 100 * float(np.mean(everywhere)), keys))
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).dropna(subset="value")
    return frame.astype({"channel": "Int64"})


def _iou(result: Result, name: str, how: Convention) -> np.ndarray:
    """IoU of each class, float64 [C], NaN where the convention leaves it out."""
    known = result.metrics.scores.get(name)
    if known is not None:
        return np.array([np.nan if value is None else value for value in known.iou], np.float64)
    protocol = result.job.protocol
    return score(
        read_counts(result.folder / "confusion.npz"), how, protocol.dataset, protocol.step(result.job.step)
    )
