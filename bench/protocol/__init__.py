"""Protocols: what is learned in which order, which images belong to a step, and how each step labels them."""

from bench.protocol.file import PROTOCOLS, load
from bench.protocol.protocol import Protocol, Step

__all__ = ["PROTOCOLS", "Protocol", "Step", "load"]
