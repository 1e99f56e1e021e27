"""Seeds: every random draw of a job follows from the run's seed and from what the draw is for.

A draw never depends on how many processes load data, on how many GPUs train, or on whether the job was
interrupted: that is what makes a resumed step end with the same bits.
"""

from __future__ import annotations

import hashlib


def mix(*parts: object) -> int:
    """A 63-bit seed from a run's seed and the names of a purpose, for example mix(seed, step, "order",
    epoch)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
