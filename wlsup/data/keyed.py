"""Randomness that is a pure function of what it is for, so that workers, order and restarts cannot change it."""

from __future__ import annotations

import hashlib
import random

__all__ = ["keyed_integer", "keyed_random"]


def keyed_integer(*parts: object) -> int:
    """Return a 64-bit integer that depends on ``parts`` alone: the head of a SHA-256 of their printed forms."""
    # The parts' lengths go in too, so that ("a", "bc") and ("ab", "c") differ whatever characters they hold.
    text = "".join(f"{len(part)}:{part}" for part in map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def keyed_random(seed: int, epoch: int, key: str, purpose: str = "view") -> random.Random:
    """Return the random stream of one sample in one epoch.

    Only ``.random()`` should be drawn from it: Python promises that sequence for an integer seed in every version.

    Args:
        seed: the run's data seed.
        epoch: 0, 1, ...
        key: the sample's stable name.
        purpose: streams of different purposes are independent.
    """
    return random.Random(keyed_integer(purpose, seed, epoch, key))
