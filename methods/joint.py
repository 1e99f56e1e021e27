"""Joint: one step with all classes at once, the upper bound ("offline")."""

from __future__ import annotations

from bench.method import Method


class Joint(Method):
    """Plain cross-entropy on all classes; old and new are reported as the protocol divides them."""

    title = "Joint"
    at_once = True
    needs_teacher = False
