"""What nothing else beats in both respects at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["pareto_front"]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the points that no other dominates, by ascending first coordinate.

    A point dominates another if it is at least as good in both coordinates, where more is better, and better in one.
    Equal points do not dominate one another. Source: Kung, Luccio and Preparata 1975; O(n log n).

    Args:
        points: (n, 2), finite.
    """
    ordered = sorted(range(len(points)), key=lambda position: points[position], reverse=True)
    front: list[int] = []
    best, best_first = -math.inf, math.inf
    for position in ordered:
        first, second = points[position]
        if second > best:
            best, best_first = second, first
            front.append(position)
        elif (first, second) == (best_first, best):
            front.append(position)
    return front[::-1]
