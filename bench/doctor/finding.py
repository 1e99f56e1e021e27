"""What a check says: in one line how a thing is, and what cures it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        what: was looked at.
        state: "ok"; "note": works, with less; "fail": a run cannot work.
        says: how it is, in words.
        cure: what mends it; "" if nothing is to be mended.
    """

    what: str
    state: State
    says: str
    cure: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.state:4}  {self.what:13}  {self.says}{'; ' if self.cure else ''}{self.cure}"


def gib(n: float) -> str:
    """Bytes in words."""
    return f"{n / 2**30:.1f} GiB"
