"""Keys: 16 hex digits that stand for everything that decides a job's outcome.

A key is a digest of a job's inputs without seed and parent, then of that with seed and parent: jobs that
differ in their seed alone share the first part. Fields with neutral values are left out, so that what later
versions add leaves old keys alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from bench.store.records import Inputs

DIGITS = 16


def digest(text: str) -> str:
    """16 hex digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def content_digest(content: Mapping[str, object]) -> str:
    """Digest of a job's inputs as JSON values; seed and parent take no part, nor do fields with neutral
    values."""
    kept = {
        name: value
        for name, value in content.items()
        if name not in ("seed", "parent") and not (name in Inputs.NEUTRAL and Inputs.NEUTRAL[name] == value)
    }
    data = kept.get("data")
    if isinstance(data, dict) and data.get("maps") == {}:
        kept["data"] = {name: value for name, value in data.items() if name != "maps"}
    return digest(json.dumps(kept, sort_keys=True, separators=(",", ":")))


def chained(content: str, seed: int, parent: str | None) -> str:
    """The key of a job whose inputs have this digest, with this seed and parent."""
    return digest(f"{content}/{seed}/{parent or ''}")


def key_of(inputs: Inputs) -> str:
    """The key of a job with these inputs."""
    return chained(content_digest(inputs.model_dump(mode="json")), inputs.seed, inputs.parent)
