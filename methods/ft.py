"""FT: fine-tuning. Each step trains the network on its own classes and labels; nothing keeps the old ones.

Its step 0, plain cross-entropy, is that of most methods.
"""

from __future__ import annotations

from bench.method import Method


class FT(Method):
    """The lower bound: the defaults of every hook, as they are."""

    title = "FT"
    needs_teacher = False
