"""Where the files that are not Python lie: protocols, cluster profiles, report templates.

In a checkout they stand beside the package; an installed wheel carries them inside it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder `name` (for example "protocols") of this installation."""
    inside = PACKAGE / "shipped" / name
    return inside if inside.is_dir() else PACKAGE.parent / name
