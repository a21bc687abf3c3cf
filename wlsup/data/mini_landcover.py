"""The classes of ``mini_landcover``: farmland, water, woods and towns from above, after the classes of EuroSAT.

No class is told by its colour alone: season, soil, haze and sun are drawn anew for each picture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from wlsup.data.mini_render import SIDE, Array, Draws, finish, noise, pixel_axes, rgb, triangle_wave

__all__ = ["LANDCOVER_CLASSES", "landcover_picture"]


def _soil(draws: Draws) -> Array:
    """A tint of ground: bare brown, dry yellow, fresh or dark green, with all that lies between."""
    ripe, fresh = draws.unit(), draws.unit()
    return rgb(
        70 + 90 * ripe + draws.between(-14, 14),
        92 + 40 * fresh + 34 * ripe + draws.between(-14, 14),
        52 + 34 * ripe + draws.between(-12, 12),
    )


def _mix(low: Array, high: Array, share: Array) -> Array:
    return low + (high - low) * share


def _step(position: Array) -> Array:
    return np.clip(position + 0.5, 0, 1)


def _meadow(draws: Draws) -> Array:
    """Unstructured green or brown: what lies beside rivers, roads and houses."""
    return _mix(_soil(draws), _soil(draws), noise(draws, 3)) + (noise(draws, 14) * 30 - 15)


def _fields(draws: Draws) -> Array:
    """Three to six fields, divided by parallel and crossing bounds, each of one tint."""
    u, v = pixel_axes(draws.between(0, 3.1416), draws.between(24, 40), draws.between(24, 40))
    canvas = _soil(draws) + np.zeros((1, SIDE, SIDE), dtype=np.float32)
    for _ in range(draws.below(3) + 2):
        across = u if draws.chance(0.55) else v
        start = draws.between(-30, 20)
        strip = _step(across - start) * _step(start + draws.between(12, 34) - across)
        if draws.chance(0.5):
            strip = strip * _step((v if across is u else u) - draws.between(-20, 20))
        canvas = _mix(canvas, _soil(draws), strip)
    return canvas


def _annual_crop(draws: Draws) -> Array:
    canvas = _fields(draws)
    u, v = pixel_axes(draws.between(0, 3.1416))
    furrows = (triangle_wave(u / draws.between(2.6, 4.5)) - 0.25) * draws.between(20, 70)
    return canvas + furrows * _step(v - draws.between(-40, 14)) + (noise(draws, 10) * 18 - 9)


def _permanent_crop(draws: Draws) -> Array:
    u, v = pixel_axes(draws.between(0, 3.1416), draws.between(0, 8), draws.between(0, 8))
    period = draws.between(4.6, 8)
    along = period * draws.between(0.8, 1.9)
    du, dv = triangle_wave(u / period) * period, triangle_wave(v / along) * along
    crowns = _step(period * draws.between(0.26, 0.38) - np.sqrt(du * du + dv * dv * draws.between(0.3, 1)))
    crowns = crowns * np.clip(noise(draws, 6) * 4 - 0.3, 0, 1)
    return _mix(_mix(_soil(draws), _soil(draws), noise(draws, 3)), _soil(draws) * draws.between(0.4, 0.75), crowns)


def _forest(draws: Draws) -> Array:
    crowns = 0.55 * noise(draws, 14) + 0.45 * noise(draws, 22)
    light = np.clip(crowns * 1.8 - 0.4, 0, 1)
    base = _mix(_soil(draws), _soil(draws), noise(draws, 4)) * draws.between(0.55, 0.95)
    clearing = np.clip((noise(draws, 4) - draws.between(0.7, 1.0)) * 8, 0, 1)
    return _mix(base * (0.55 + 0.75 * light), _soil(draws), clearing)


def _herbaceous(draws: Draws) -> Array:
    patches = np.clip((noise(draws, 5) * 0.6 + noise(draws, 10) * 0.4) * 2.6 - 0.8, 0, 1)
    scrub = np.clip((noise(draws, 24) - 0.6) * 6, 0, 1) * draws.between(0.2, 0.8)
    return _mix(_mix(_soil(draws), _soil(draws), patches), _soil(draws) * 0.6, scrub)


def _pasture(draws: Draws) -> Array:
    canvas = _mix(_soil(draws), _soil(draws), noise(draws, 2) * 0.4) + (noise(draws, 12) * 12 - 6)
    u, v = pixel_axes(draws.between(0, 3.1416), draws.between(10, 54), draws.between(10, 54))
    hedge = _step(draws.between(0.7, 1.6) - np.abs(u + noise(draws, 5) * 2)) * np.clip(noise(draws, 10) * 4 - 0.6, 0, 1)
    if draws.chance(0.5):
        hedge = np.maximum(hedge, _step(1 - np.abs(v)) * _step(u))
    return _mix(canvas, _soil(draws) * 0.5, hedge)


def _water(draws: Draws) -> Array:
    murk = draws.unit()
    return rgb(24 + 76 * murk, 58 + 48 * murk + draws.between(-12, 20), 92 + draws.between(-30, 40) - 20 * murk)


def _land(draws: Draws) -> Array:
    return _fields(draws) if draws.chance(0.5) else _meadow(draws)


def _river(draws: Draws) -> Array:
    u, v = pixel_axes(draws.between(0, 3.1416), draws.between(20, 44), draws.between(20, 44))
    middle = u + (noise(draws, 2) - 0.5) * draws.between(18, 46) + (noise(draws, 5) - 0.5) * 6
    width = draws.between(2.2, 7.5) * (0.8 + 0.5 * noise(draws, 4))
    bank = _mix(_land(draws), _soil(draws) * 0.7, _step(width + draws.between(0, 5) - np.abs(middle)) * 0.7)
    return _mix(bank, _water(draws), _step(width - np.abs(middle)))


def _highway(draws: Draws) -> Array:
    u, v = pixel_axes(draws.between(0, 3.1416), draws.between(20, 44), draws.between(20, 44))
    middle = u + v * v * draws.between(-0.008, 0.008)
    width = draws.between(1.6, 4.2)
    tone = draws.between(70, 190)
    asphalt = rgb(tone, tone + draws.between(-6, 4), tone + draws.between(-12, 8)) + (noise(draws, 20) * 20 - 10)
    road = _step(width - np.abs(middle))
    if draws.chance(0.4):
        road = np.maximum(road, _step(width * 0.7 - np.abs(v - draws.between(-16, 16) + u * draws.between(-0.5, 0.5))))
    canvas = _mix(_land(draws), asphalt, road)
    if width > 2.4:
        canvas = _mix(canvas, _soil(draws) if draws.chance(0.5) else rgb(220, 220, 214), _step(-np.abs(middle)) * 0.8)
    return canvas


def _lake(draws: Draws) -> Array:
    u, _ = pixel_axes(draws.between(0, 6.2832))
    water = _water(draws) + (noise(draws, 3) * 16 - 8) + (noise(draws, 16, 28) * 10 - 5)
    shore = u * draws.between(0.5, 1) + (noise(draws, 3) - 0.5) * 30 - draws.between(4, 44)
    return _mix(water, _land(draws), _step(shore * 0.6))


def _buildings(draws: Draws, size: float, fill: float, grey: float) -> tuple[Array, Array]:
    """Roofs in blocks along streets: their paint (3, SIDE, SIDE) and mask (SIDE, SIDE)."""
    u, v = pixel_axes(draws.between(0, 3.1416), draws.between(0, 16), draws.between(0, 16))
    pitch_u, pitch_v = size * draws.between(1.3, 1.8), size * draws.between(1.3, 1.8)
    row, column = np.floor(u / pitch_u), np.floor(v / pitch_v)
    index = row.astype(np.int64) % 32, column.astype(np.int64) % 32
    width, depth = (draws.units(32, 32)[index] * 0.34 + fill for _ in range(2))
    built = draws.units(32, 32)[index] < draws.between(0.7, 0.98)
    mask = _step((triangle_wave(u / pitch_u) * -1 + width * 0.5) * pitch_u)
    mask = mask * _step((triangle_wave(v / pitch_v) * -1 + depth * 0.5) * pitch_v) * built
    tone = draws.units(32, 32)[index] * 110 + 80
    warm = draws.units(32, 32)[index] * (1 - grey)
    slope = np.where(u / pitch_u - row > 0.5, 1.0, draws.between(0.72, 1.0))
    paint = np.stack([tone + warm * 60, tone - warm * 20, tone - warm * 40]) * slope
    return paint.astype(np.float32), mask


def _residential(draws: Draws) -> Array:
    ground = _mix(
        _meadow(draws), rgb(128, 124, 118), draws.between(0.1, 0.7) + np.zeros((SIDE, SIDE), dtype=np.float32)
    )
    trees = np.clip((noise(draws, 16) - 0.62) * 7, 0, 1)
    paint, mask = _buildings(draws, draws.between(3.6, 6.2), 0.42, draws.between(0, 0.8))
    return _mix(_mix(ground, paint, mask), _soil(draws) * 0.55, trees * draws.between(0.2, 0.9))


def _industrial(draws: Draws) -> Array:
    tone = draws.between(88, 164)
    yard = _mix(rgb(tone, tone, tone - 4), _soil(draws), np.clip(noise(draws, 4) * 2.4 - 1.3, 0, 1))
    paint, mask = _buildings(draws, draws.between(9, 20), 0.5, draws.between(0.4, 1))
    return _mix(yard + (noise(draws, 18) * 24 - 12), paint * 1.12, mask)


LANDCOVER_CLASSES: dict[str, Callable[[Draws], Array]] = {
    "annual crop": _annual_crop,
    "forest": _forest,
    "herbaceous vegetation": _herbaceous,
    "highway": _highway,
    "industrial": _industrial,
    "pasture": _pasture,
    "permanent crop": _permanent_crop,
    "residential": _residential,
    "river": _river,
    "sea or lake": _lake,
}


def landcover_picture(draws: Draws, kind: str) -> NDArray[np.uint8]:
    """Paint one patch of land from above.

    Args:
        draws: the picture's random numbers.
        kind: a key of `LANDCOVER_CLASSES`.

    Returns:
        (3, 64, 64) uint8.
    """
    canvas = LANDCOVER_CLASSES[kind](draws)
    haze = draws.between(0, 0.45)
    tint = rgb(*(draws.between(0.82, 1.16) for _ in range(3)))
    canvas = canvas * tint * draws.between(0.7, 1.25)
    canvas = canvas + (rgb(150, 160, 172) - canvas) * haze
    return finish(canvas + (draws.bytes(SIDE, SIDE) / np.float32(255) - 0.5) * draws.between(4, 18))
