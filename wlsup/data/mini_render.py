"""The brush of the mini world: random draws, anti-aliased shapes, patterns and noise on a 64 x 64 canvas.

Every pixel comes from operations that IEEE 754 fixes to the last bit (add, multiply, divide, square root, floor,
comparisons) and from products of small integers, which are exact in any order of summation; cosines are rounded to
1/4096. The same arguments therefore paint the same bytes on every machine.

Coordinates: pixels, x to the right, y down, the centre of the top left pixel at (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PATTERNS",
    "SHAPES",
    "SIDE",
    "Array",
    "Draws",
    "blend",
    "coverage",
    "finish",
    "local_axes",
    "noise",
    "pixel_axes",
    "rgb",
    "triangle_wave",
    "turn",
    "window",
]

SIDE = 64
Array = NDArray[np.float32]
T = TypeVar("T")

_AXIS = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)


class Draws:
    """The random numbers of one picture, a stream of its own that no other picture shares.

    Args:
        words: non-negative integers that name the stream (salt, split, seed, index).
    """

    def __init__(self, *words: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
        self._pool: list[float] = []

    def unit(self) -> float:
        """One number in [0, 1)."""
        if not self._pool:
            self._pool = self._generator.random(128).tolist()
        return self._pool.pop()

    def between(self, low: float, high: float) -> float:
        """One number in [low, high)."""
        return low + (high - low) * self.unit()

    def below(self, count: int) -> int:
        """One integer in [0, count)."""
        return int(self.unit() * count)

    def chance(self, probability: float) -> bool:
        """True with ``probability``."""
        return self.unit() < probability

    def pick(self, options: Sequence[T]) -> T:
        """One of ``options``, all equally likely."""
        return options[int(self.unit() * len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different ones of ``options``, in random order."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def bytes(self, *shape: int) -> Array:
        """Whole numbers in [0, 255] as float32, of ``shape``."""
        return self._generator.integers(0, 256, size=shape, dtype=np.uint8).astype(np.float32)

    def units(self, *shape: int) -> Array:
        """Numbers in [0, 1) as float32, of ``shape``, in steps of 1/65536."""
        return self._generator.integers(0, 65536, size=shape, dtype=np.uint16).astype(np.float32) / np.float32(65536)


def rgb(red: float, green: float, blue: float) -> Array:
    """A colour as (3, 1, 1)."""
    return np.array([red, green, blue], dtype=np.float32).reshape(3, 1, 1)


def turn(angle: float) -> tuple[float, float]:
    """Cosine and sine of ``angle`` (radians), rounded to 1/4096 so that no two maths libraries disagree."""
    return round(math.cos(angle) * 4096) / 4096, round(math.sin(angle) * 4096) / 4096


def window(x: float, y: float, reach: float) -> tuple[slice, slice]:
    """Rows and columns of the canvas that lie within ``reach`` pixels of (x, y)."""
    rows = slice(min(max(int(y - reach), 0), SIDE), max(min(int(y + reach) + 2, SIDE), 0))
    columns = slice(min(max(int(x - reach), 0), SIDE), max(min(int(x + reach) + 2, SIDE), 0))
    return rows, columns


def local_axes(where: tuple[slice, slice], x: float, y: float, angle: float) -> tuple[Array, Array]:
    """Coordinates (h, w) in pixels of a window in a frame at (x, y), turned by ``angle``, second axis pointing up."""
    cosine, sine = turn(angle)
    across = _AXIS[where[1]][None, :] - x
    down = _AXIS[where[0]][:, None] - y
    return across * cosine + down * sine, across * sine - down * cosine


def pixel_axes(angle: float = 0.0, x: float = SIDE / 2, y: float = SIDE / 2) -> tuple[Array, Array]:
    """`local_axes` of the whole canvas."""
    return local_axes((slice(0, SIDE), slice(0, SIDE)), x, y, angle)


def coverage(distance: Array) -> Array:
    """Share of each pixel inside a shape, from signed distance in pixels (negative inside): one pixel of soft edge."""
    return np.clip(np.float32(0.5) - distance, 0, 1)


def blend(canvas: Array, where: tuple[slice, slice], alpha: Array, paint: Array) -> None:
    """Lay ``paint`` (3, 1, 1) or (3, h, w) over a window of ``canvas``, in place, by ``alpha`` (h, w)."""
    view = canvas[:, where[0], where[1]]
    view += alpha * (paint - view)


def finish(canvas: Array) -> NDArray[np.uint8]:
    """Round a canvas of numbers around [0, 255] to bytes (3, SIDE, SIDE)."""
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)


# -- Shapes: signed distance in units of the radius, over coordinates (u, v) in the same units, v up. ----------------


def _length(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v)


def _circle(u: Array, v: Array) -> Array:
    return _length(u, v) - 1


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.86


def _bar(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u) - 1.1, np.abs(v) - 0.42)


def _oval(u: Array, v: Array) -> Array:
    # Distance to an ellipse to first order: the implicit function over the length of its gradient.
    a, b = 1 / 1.1, 1 / 0.62
    first = _length(u * a, v * b)
    second = _length(u * (a * a), v * (b * b))
    return first * (first - 1) / np.maximum(second, 1e-3)


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u) * 0.866025 + v * 0.5 - 0.5, -v - 0.62)


def _diamond(u: Array, v: Array) -> Array:
    return (np.abs(u) * 1.6 + np.abs(v)) * 0.53 - 0.58


def _hexagon(u: Array, v: Array) -> Array:
    across = np.abs(u)
    return np.maximum(across * 0.5 + np.abs(v) * 0.866025, across) - 0.88


def _cross(u: Array, v: Array) -> Array:
    across, up = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(across, up) - 1, np.minimum(across, up) - 0.34)


def _ring(u: Array, v: Array) -> Array:
    return np.abs(_length(u, v) - 0.78) - 0.24


def _half_circle(u: Array, v: Array) -> Array:
    low = v + 0.45
    return np.maximum(_length(u, low) - 1.05, -low)


def _crescent(u: Array, v: Array) -> Array:
    return np.maximum(_length(u, v) - 1, 0.78 - _length(u - 0.5, v))


def _star(u: Array, v: Array) -> Array:
    # Folded into one half of one arm by two mirrors, then the distance to a segment.
    u = np.abs(u)
    fold = np.maximum(u * 0.809017 - v * 0.587785, 0) * 2
    u, v = u - fold * 0.809017, v + fold * 0.587785
    fold = np.maximum(-u * 0.809017 - v * 0.587785, 0) * 2
    u, v = np.abs(u + fold * 0.809017), v + fold * 0.587785 - 1.1
    edge_u, edge_v = 0.44 * 0.587785, 0.44 * 0.809017 - 1
    along = np.clip((u * edge_u + v * edge_v) / (edge_u * edge_u + edge_v * edge_v), 0, 1.1)
    return _length(u - edge_u * along, v - edge_v * along) * np.sign(v * edge_u - u * edge_v)


def _heart(u: Array, v: Array) -> Array:
    u, v = np.abs(u) * 0.58, v * 0.58 + 0.55
    lobe = _length(u - 0.25, v - 0.75) - 0.353553
    bisector = np.maximum(u + v, 0) * 0.5
    body = np.minimum(u * u + (v - 1) * (v - 1), (u - bisector) ** 2 + (v - bisector) ** 2)
    return np.where(u + v > 1, lobe, np.sqrt(body) * np.sign(u - v)) / 0.58


def _arrow(u: Array, v: Array) -> Array:
    across = np.abs(u)
    head = np.maximum(across * 0.75 + v * 0.66 - 0.68, -v + 0.08)
    return np.minimum(head, np.maximum(across - 0.27, np.abs(v + 0.4) - 0.6))


def _drop(u: Array, v: Array) -> Array:
    low = v + 0.38
    return np.minimum(_length(u, low) - 0.66, np.maximum(np.abs(u) * 0.88 + low * 0.475 - 0.66, -low + 0.313))


def _flower(u: Array, v: Array) -> Array:
    across, up = np.abs(u), np.abs(v)
    petals = np.minimum(_length(across, up - 0.64), _length(across - 0.5543, up - 0.32))
    return np.minimum(petals - 0.37, _length(u, v) - 0.45)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
    "hexagon": _hexagon,
    "arrow": _arrow,
    "diamond": _diamond,
    "oval": _oval,
    "bar": _bar,
    "half circle": _half_circle,
    "drop": _drop,
    "flower": _flower,
}


# -- Patterns: a mask in [0, 1] over coordinates in pixels, repeating every ``period`` pixels. ------------------------


def triangle_wave(position: Array) -> Array:
    """|x - nearest half| of a position in periods: 0.5 at whole numbers, 0 half-way between, in [0, 0.5]."""
    return np.abs(position - np.floor(position) - np.float32(0.5))


def _half_on(wave: Array, period: float, threshold: float = 0.25) -> Array:
    return np.clip((wave - threshold) * period + 0.5, 0, 1)


def _striped(u: Array, v: Array, period: float) -> Array:
    return _half_on(triangle_wave(u / period), period)


def _dotted(u: Array, v: Array, period: float) -> Array:
    return np.clip((0.3 - _length(triangle_wave(u / period), triangle_wave(v / period))) * period + 0.5, 0, 1)


def _checked(u: Array, v: Array, period: float) -> Array:
    first = _half_on(triangle_wave(u / period), period)
    second = _half_on(triangle_wave(v / period), period)
    return first + second - 2 * first * second


def _gridded(u: Array, v: Array, period: float) -> Array:
    nearest = np.maximum(triangle_wave(u / period), triangle_wave(v / period))
    return _half_on(nearest, period, 0.5 - 0.9 / period - 0.05)


def _zigzag(u: Array, v: Array, period: float) -> Array:
    return _half_on(triangle_wave(u / period + triangle_wave(v / (1.6 * period)) * 1.5), period)


def _wavy(u: Array, v: Array, period: float) -> Array:
    ramp = triangle_wave(v / (2.2 * period)) * 2
    return _half_on(triangle_wave(u / period + ramp * ramp * (3 - 2 * ramp) * 0.9), period)


def _ringed(u: Array, v: Array, period: float) -> Array:
    return _half_on(triangle_wave(_length(u, v) / period + 0.25), period)


PATTERNS: dict[str, Callable[[Array, Array, float], Array]] = {
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
    "gridded": _gridded,
    "zigzag": _zigzag,
    "wavy": _wavy,
    "ringed": _ringed,
}


# -- Noise ------------------------------------------------------------------------------------------------------------


@cache
def _interpolation(cells: int) -> Array:
    # Rows of smooth weights in steps of 1/64: with byte-sized values the two products below are exact in float32.
    position = (np.arange(SIDE) * 2 + 1) * cells  # in units of 1/128 cell
    left, fraction = position // (2 * SIDE), (position % (2 * SIDE)) / (2 * SIDE)
    smooth = np.rint(fraction * fraction * (3 - 2 * fraction) * 64) / 64
    weights = np.zeros((SIDE, cells + 1), dtype=np.float32)
    weights[np.arange(SIDE), left] = 1 - smooth
    weights[np.arange(SIDE), left + 1] += smooth
    return weights


def noise(draws: Draws, rows: int, columns: int | None = None) -> Array:
    """Smooth value noise in [0, 1], (SIDE, SIDE), with ``rows`` x ``columns`` cells (square cells when omitted)."""
    columns = columns or rows
    values = draws.bytes(rows + 1, columns + 1)
    return (_interpolation(rows) @ values @ _interpolation(columns).T) / np.float32(255)
