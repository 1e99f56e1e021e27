"""The errors that a user can mend, or must know of, and the words they come in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: one line that names file, key, value and cure. The command exits with
    status 2."""


class TrainingError(Exception):
    """Training cannot go on; the message names the cause."""


def unknown(what: str, name: object, known: Iterable[str], where: str = "") -> UserError:
    """A `UserError` for a name that does not exist, with the nearest one that does.

    Args:
        what: the kind of thing, for example "protocol".
        name: what the user wrote.
        known: every allowed name.
        where: the file or option it was found in, put in front.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names) if len(names) <= 40 else ", ".join(names[:40]) + ", …"
    return UserError(f"{where + ': ' if where else ''}unknown {what} {str(name)!r}{hint} (known: {shown})")
