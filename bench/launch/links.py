"""Links for people, results/<protocol>/<track>/<method>/seed-<n>/step-<t>, and what a report must know."""

from __future__ import annotations

from bench.errors import UserError
from bench.plan.keys import content_digest
from bench.plan.plan import Chain, Plan
from bench.store.records import ChainRecord, DataRecord, read_record
from bench.store.results import Store

DIGITS = 6


def link(plan: Plan, store: Store) -> None:
    """Link to the artifacts of a plan as they will be; chain.json says how the rows of a table are read."""
    for chain in plan.chains:
        folder = _folder(chain, plan, store)
        for t, key in enumerate(chain.keys):
            store.link(chain.place(t, folder), key)
        place = f"{folder}/{chain.track}/{chain.method}/{ChainRecord.file}"
        store.write(place, describe(chain))


def describe(chain: Chain) -> ChainRecord:
    """What a report must know of a row."""
    config = chain.recipe.config
    return ChainRecord(
        protocol=chain.protocol,
        track=chain.track,
        method=chain.method,
        title=chain.title,
        steps=len(chain.keys),
        footnotes=list(chain.footnotes),
        network=config.network,
        settings=config.model_dump(mode="json"),
        sources=dict(chain.recipe.sources),
    )


def _folder(chain: Chain, plan: Plan, store: Store) -> str:
    """results/<protocol>.

    Other data or another class order under that name gets a folder of its own, so that no table mixes them.
    """
    data = plan.jobs[chain.keys[0]].inputs.data
    record = DataRecord(
        fingerprint=f"{data.train}-{data.test}",
        groups=[list(group) for group in chain.protocol.groups],
        root=plan.data_root,
        data_set=chain.protocol.dataset.title,
    )
    same = {"fingerprint": record.fingerprint, "groups": record.groups}
    label = chain.protocol.label
    for name in (label, f"{label}~{content_digest(same)[:DIGITS]}"):
        known = read_record(store.root / name / DataRecord.file, DataRecord)
        if known is None:
            store.write(f"{name}/{DataRecord.file}", record)
            return name
        if (known.fingerprint, known.groups) == (record.fingerprint, record.groups):
            return name
    what = "holds the results of other data or another class order"
    raise UserError(f"{store.root / name}: {what}; use another --results DIR")
