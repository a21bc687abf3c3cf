"""The classes of ``mini_textures``: fields of one texture in random colours, scale, direction and light."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from wlsup.data.mini_grounds import two_nearest
from wlsup.data.mini_render import (
    PATTERNS,
    SIDE,
    Array,
    Draws,
    coverage,
    finish,
    local_axes,
    noise,
    pixel_axes,
    rgb,
    triangle_wave,
    window,
)

__all__ = ["TEXTURE_CLASSES", "texture_picture"]

# What every class draws upon: two axes in pixels, turned and bent at random, and a scale in pixels.
_Weave = Callable[[Draws, Array, Array, float], Array]


def _pattern(name: str) -> _Weave:
    return lambda draws, u, v, period: PATTERNS[name](u, v, period)


def _woven(draws: Draws, u: Array, v: Array, period: float) -> Array:
    strand = period * 0.75
    over = (np.floor(u / strand) + np.floor(v / strand)) % 2
    thread = np.where(over > 0, triangle_wave(u / strand), triangle_wave(v / strand))
    return np.clip(1.15 - thread * 2.2, 0, 1) * (0.75 + 0.25 * over)


def _scattered(draws: Draws, period: float) -> list[tuple[float, float]]:
    # A jittered lattice, finer than a plain draw and without its clumps, that covers the canvas at any turn.
    count = int(SIDE * 1.5 / period) + 1
    shift = (draws.units(count, count, 2) * 0.8 + 0.1) * period - count * period / 2
    lattice = np.arange(count, dtype=np.float32) * np.float32(period)
    x, y = shift[:, :, 0] + lattice[None, :], shift[:, :, 1] + lattice[:, None]
    near = np.maximum(np.abs(x), np.abs(y)) < SIDE * 0.5 + period
    return list(zip(x[near].tolist(), y[near].tolist(), strict=True))


def _cracked(draws: Draws, u: Array, v: Array, period: float) -> Array:
    cell = period * 1.7
    u, v = u - u[31, 31], v - v[31, 31]
    nearest, second = two_nearest([(u - x) ** 2 + (v - y) ** 2 for x, y in _scattered(draws, cell)])
    return np.clip((np.sqrt(second) - np.sqrt(nearest)) * 0.7 - 0.15, 0, 1)


def _bubbly(draws: Draws, u: Array, v: Array, period: float) -> Array:
    mask = np.zeros_like(u)
    cell = period * 1.6
    for x, y in _scattered(draws, cell):
        radius = cell * draws.between(0.28, 0.62)
        where = window(x + SIDE / 2, y + SIDE / 2, radius + 1)
        across, up = local_axes(where, x + SIDE / 2, y + SIDE / 2, 0.0)
        apart = np.sqrt(across * across + up * up)
        inside = coverage(apart - radius)
        view = mask[where]
        np.maximum(
            view * (1 - inside * 0.7), np.maximum(np.clip(1.3 - np.abs(apart - radius), 0, 1), inside * 0.25), out=view
        )
    return mask


def _marbled(draws: Draws, u: Array, v: Array, period: float) -> Array:
    swirl = noise(draws, 3) * 2.4 + noise(draws, 7) * 1.1
    vein = triangle_wave(u / (period * 2.4) + swirl) * 2
    return np.clip(vein * vein * 1.1 + noise(draws, 12) * 0.25 - 0.1, 0, 1)


TEXTURE_CLASSES: dict[str, _Weave] = {
    "striped": _pattern("striped"),
    "dotted": _pattern("dotted"),
    "checked": _pattern("checked"),
    "grid": _pattern("gridded"),
    "zigzag": _pattern("zigzag"),
    "wavy": _pattern("wavy"),
    "woven": _woven,
    "cracked": _cracked,
    "bubbly": _bubbly,
    "marbled": _marbled,
}


def _tint(draws: Draws, level: float) -> Array:
    return rgb(*(min(max(level + draws.between(-18, 18), 0), 255) for _ in range(3)))


def texture_picture(draws: Draws, kind: str) -> NDArray[np.uint8]:
    """Paint one texture field.

    Args:
        draws: the picture's random numbers.
        kind: a key of `TEXTURE_CLASSES`.

    Returns:
        (3, 64, 64) uint8.
    """
    # Turned by up to 23 degrees, bent a little, at a scale of its own.
    u, v = pixel_axes(draws.between(-0.4, 0.4), draws.between(0, SIDE), draws.between(0, SIDE))
    bend = draws.between(0, 5)
    u, v = u + (noise(draws, 2) - 0.5) * bend, v + (noise(draws, 2) - 0.5) * bend
    mask = TEXTURE_CLASSES[kind](draws, u, v, draws.between(8, 13))
    # Any two tints, the second darker: the class is in the pattern, never in the colour.
    light_level = draws.between(150, 240)
    dark_level = light_level - draws.between(60, 130)
    first, second = (_tint(draws, level) for level in (light_level, dark_level))
    canvas = first + (second - first) * mask
    light = 1 + (noise(draws, 2) - 0.5) * draws.between(0, 0.4)
    grain = (draws.bytes(SIDE, SIDE) / np.float32(255) - 0.5) * draws.between(2, 12)
    return finish(canvas * light + grain)
