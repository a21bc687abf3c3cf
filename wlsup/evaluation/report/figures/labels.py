"""Names beside points, so that none covers another."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.axes import Axes

__all__ = ["place_labels"]

_SIZE, _WIDE, _TALL = 8.5, 0.56, 1.15  # points; a letter's width and a line's height, in sizes
_RADII = (7.0, 16.0, 28.0, 42.0, 58.0)
_DIRECTIONS = [(math.cos(a), math.sin(a)) for a in (0, math.pi, *(k * math.pi / 4 for k in (1, 3, 5, 7, 2, 6)))]


def place_labels(one: Axes, spots: Mapping[str, tuple[float, float]], colours: Mapping[str, str], paper: str) -> None:
    """Write each point's name where it overlaps others and points the least, with a line where it must stand off.

    Greedy: from the outermost point inwards, the nearest free one of some places around the point.

    Args:
        one: axes with their final limits.
        spots: name -> its point, in data coordinates.
        colours: name -> its colour.
        paper: what is behind the figure, laid under the names.
    """
    figure = one.figure
    width, height = (side * 72 for side in figure.get_size_inches())
    left, right = one.get_xlim()
    bottom, top = one.get_ylim()
    # The axes' place is settled when the figure is drawn; what ticks and labels take is much the same in all figures.
    inner = (0.86 * width, 0.86 * height)
    where = {
        name: (inner[0] * (x - left) / (right - left), inner[1] * (y - bottom) / (top - bottom))
        for name, (x, y) in spots.items()
    }
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in where.values()]
    middle = (sum(x for x, _ in where.values()) / len(where), sum(y for _, y in where.values()) / len(where))
    for name in sorted(where, key=lambda name: -math.dist(where[name], middle)):
        x, y = where[name]
        wide, tall = _WIDE * _SIZE * len(name), _TALL * _SIZE
        best = None
        for ring, radius in enumerate(_RADII):
            for dx, dy in _DIRECTIONS:
                anchor = (x + radius * dx, y + radius * dy)
                shift = 0.0 if dx > 0.3 else wide if dx < -0.3 else wide / 2
                box = (anchor[0] - shift, anchor[1] - tall / 2, anchor[0] - shift + wide, anchor[1] + tall / 2)
                outside = box[0] < 0 or box[1] < 0 or box[2] > inner[0] or box[3] > inner[1]
                cost = sum(_overlap(box, other) for other in taken) + 4 * ring + 1000 * outside
                # A name must not look as if it were another's: no other point nearer to it than its own.
                own = _distance(box, (x, y))
                cost += 60 * sum(_distance(box, spot) < own + 3 for other, spot in where.items() if other != name)
                if best is None or cost < best[0]:
                    best = (cost, box, (radius * dx, radius * dy), dx, ring)
        _, box, offset, dx, ring = best
        taken.append(box)
        one.annotate(
            name, spots[name], offset, textcoords="offset points", fontsize=_SIZE, color=colours[name],
            ha="left" if dx > 0.3 else "right" if dx < -0.3 else "center", va="center",
            bbox={"boxstyle": "square,pad=0.1", "facecolor": paper, "edgecolor": "none", "alpha": 0.8},
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.5} if ring > 1 else None,
        )  # fmt: skip


def _distance(box: tuple[float, ...], spot: tuple[float, float]) -> float:
    across = max(box[0] - spot[0], 0.0, spot[0] - box[2])
    along = max(box[1] - spot[1], 0.0, spot[1] - box[3])
    return math.hypot(across, along)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0
