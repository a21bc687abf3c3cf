"""What the objects of the mini world stand on: sand, grass, water, brick, snow, night and other grounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wlsup.data.mini_render import SIDE, Array, Draws, noise, pixel_axes, rgb, triangle_wave

__all__ = [
    "COLOURS",
    "GROUNDS",
    "PLAIN_COLOURS",
    "GroundPaint",
    "colour_near",
    "paint_ground",
    "paint_paper",
    "two_nearest",
]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 36, 38),
    "orange": (242, 134, 28),
    "yellow": (246, 218, 46),
    "green": (44, 158, 58),
    "turquoise": (38, 192, 186),
    "blue": (38, 82, 206),
    "purple": (128, 52, 172),
    "pink": (244, 136, 184),
    "brown": (118, 70, 34),
    "white": (244, 244, 240),
    "grey": (132, 132, 134),
    "black": (26, 26, 30),
}

# A ground's paint: the canvas (3, SIDE, SIDE) and the names of the colours it took, in the order a caption uses them.
GroundPaint = tuple[Array, tuple[str, ...]]


def colour_near(draws: Draws, name: str, spread: float = 13) -> Array:
    """The named colour, each channel off by at most ``spread``, as (3, 1, 1)."""
    return rgb(*(channel + draws.between(-spread, spread) for channel in COLOURS[name]))


def _fractal(draws: Draws, cells: int) -> Array:
    return 0.5 * noise(draws, cells) + 0.3 * noise(draws, 2 * cells) + 0.2 * noise(draws, 4 * cells)


def _grain(draws: Draws) -> Array:
    return draws.bytes(SIDE, SIDE) / np.float32(255) - np.float32(0.5)


def _mix(low: Array, high: Array, share: Array) -> Array:
    return low + (high - low) * share


def _sand(draws: Draws) -> GroundPaint:
    base = rgb(222 + draws.between(-10, 10), 194 + draws.between(-10, 10), 142 + draws.between(-14, 10))
    return base + (_fractal(draws, 4) * 30 - 15) + _grain(draws) * 30, ()


def _grass(draws: Draws) -> GroundPaint:
    base = rgb(78 + draws.between(-18, 22), 146 + draws.between(-16, 16), 58 + draws.between(-14, 14))
    blades = noise(draws, 16, 48) * 52 + noise(draws, 4) * 26 - 39
    return base + blades * rgb(0.8, 1, 0.6), ()


def _water(draws: Draws) -> GroundPaint:
    deep = rgb(34 + draws.between(-8, 14), 96 + draws.between(-16, 16), 158 + draws.between(-14, 16))
    _, down = pixel_axes()
    crest = triangle_wave(down / draws.between(7, 11) + noise(draws, 2, 6) * 1.6) * 2
    return deep + (crest * crest * 62 + noise(draws, 8, 3) * 20 - 20) * rgb(0.8, 0.9, 0.7), ()


def _brick(draws: Draws) -> GroundPaint:
    height, width = draws.between(7, 9), draws.between(15, 19)
    across, down = pixel_axes(x=draws.between(0, 16), y=draws.between(0, 16))
    course = np.floor(down / height)
    along = across / width + course * 0.5
    mortar = np.maximum((triangle_wave(along) - 0.5) * width + 1.3, (triangle_wave(down / height) - 0.5) * height + 1.3)
    # A tone for each brick, from its row and column.
    tone = draws.units(16, 16)[course.astype(np.int64) % 16, np.floor(along).astype(np.int64) % 16]
    bricks = rgb(164, 76, 54) + (tone * 46 - 23) * rgb(1, 0.8, 0.6) + _grain(draws) * 18
    return _mix(bricks, rgb(196, 186, 172), np.clip(mortar, 0, 1)), ()


def _snow(draws: Draws) -> GroundPaint:
    drift = _fractal(draws, 3)
    return _mix(rgb(206, 218, 234), rgb(246, 248, 250), np.clip(drift * 1.8 - 0.35, 0, 1)), ()


def _night(draws: Draws) -> GroundPaint:
    _, down = pixel_axes()
    sky = _mix(rgb(12, 14, 34), rgb(34, 38, 84), np.clip(0.5 - down / 80 + noise(draws, 2) * 0.4 - 0.2, 0, 1))
    lights = np.clip((draws.units(SIDE, SIDE) - 0.985) * 66, 0, 1)
    return sky + lights * rgb(225, 222, 190), ()


def _sky(draws: Draws) -> GroundPaint:
    _, down = pixel_axes()
    blue = _mix(rgb(88, 154, 224), rgb(164, 206, 240), np.clip(0.5 - down / 64, 0, 1))
    cloud = np.clip((0.65 * noise(draws, 5, 3) + 0.35 * noise(draws, 12, 8)) * 2.6 - 1.2, 0, 1)
    return _mix(blue, rgb(246, 248, 250), cloud), ()


def _wood(draws: Draws) -> GroundPaint:
    plank = draws.between(13, 19)
    across, down = pixel_axes(y=draws.between(0, 16))
    board = np.floor(down / plank)
    tone = draws.units(8)[board.astype(np.int64) % 8]
    grain = triangle_wave(down / 4.1 + noise(draws, 6, 2) * 2.2) * 26 + noise(draws, 24, 3) * 24
    wood = rgb(176, 124, 74) + (tone * 36 - 34 + grain) * rgb(1, 0.85, 0.65)
    gap = np.clip((triangle_wave(down / plank) - 0.5) * plank + 1.0, 0, 1)
    return _mix(wood + across * 0, rgb(84, 54, 30), gap), ()


def _tiles(draws: Draws) -> GroundPaint:
    size = draws.between(12, 17)
    across, down = pixel_axes(x=draws.between(0, 16), y=draws.between(0, 16))
    joint = np.maximum(triangle_wave(across / size), triangle_wave(down / size)) - 0.5
    column, row = np.floor(across / size).astype(np.int64) % 8, np.floor(down / size).astype(np.int64) % 8
    tone = draws.units(8, 8)[row, column]
    face = rgb(186, 190, 196) + (tone * 30 - 15) + _grain(draws) * 8
    return _mix(face, rgb(110, 112, 118), np.clip(joint * size + 1.2, 0, 1)), ()


def _gravel(draws: Draws) -> GroundPaint:
    stones = 0.6 * noise(draws, 20) + 0.4 * noise(draws, 32)
    return rgb(126, 120, 114) + (np.clip(stones * 2 - 0.5, 0, 1) * 116 - 60) + _grain(draws) * 24, ()


def _mat(draws: Draws) -> GroundPaint:
    period = draws.between(6, 9)
    across, down = pixel_axes(draws.pick((0.0, 0.785398)))
    over = (np.floor(across / period) + np.floor(down / period)) % 2
    thread = np.where(over > 0, triangle_wave(across / period), triangle_wave(down / period))
    return rgb(190, 158, 104) + (thread * -110 + over * 12 + 14) * rgb(1, 0.95, 0.8) + _grain(draws) * 10, ()


def _cracked(draws: Draws) -> GroundPaint:
    across, down = pixel_axes()
    points = (draws.units(22, 2) - 0.5) * np.float32(76)
    apart = [(across - x) ** 2 + (down - y) ** 2 for x, y in points.tolist()]
    nearest, second = two_nearest(apart)
    gap = np.sqrt(second) - np.sqrt(nearest)
    earth = rgb(178, 140, 102) + (noise(draws, 8) * 30 - 15) + _grain(draws) * 12
    return _mix(rgb(72, 50, 38), earth, np.clip(gap * 0.6, 0, 1)), ()


def two_nearest(apart: list[Array]) -> tuple[Array, Array]:
    """Smallest and second smallest of a list of maps, pixel by pixel."""
    nearest = np.minimum(apart[0], apart[1])
    second = np.maximum(apart[0], apart[1])
    for candidate in apart[2:]:
        np.minimum(second, np.maximum(nearest, candidate), out=second)
        np.minimum(nearest, candidate, out=nearest)
    return nearest, second


def _plain(draws: Draws) -> GroundPaint:
    name = draws.pick(tuple(COLOURS))
    return colour_near(draws, name) + (noise(draws, 3) * 18 - 9), (name,)


def _gradient(draws: Draws) -> GroundPaint:
    first, second = draws.sample(tuple(COLOURS), 2)
    along, _ = pixel_axes(draws.between(0, 6.2832))
    return _mix(colour_near(draws, first), colour_near(draws, second), np.clip(along / 72 + 0.5, 0, 1)), (first, second)


def _static(draws: Draws) -> GroundPaint:
    return draws.bytes(SIDE, SIDE)[None] * 0.55 + 58 + (noise(draws, 4) * 20 - 10) + rgb(0, 0, 0), ()


# Name -> painter and the colours that would not stand out on it.
GROUNDS: dict[str, tuple[Callable[[Draws], GroundPaint], tuple[str, ...]]] = {
    "sand": (_sand, ("yellow", "orange", "white", "brown")),
    "grass": (_grass, ("green",)),
    "water": (_water, ("blue", "turquoise")),
    "brick": (_brick, ("red", "brown", "orange")),
    "snow": (_snow, ("white", "grey")),
    "night": (_night, ("black", "blue", "purple", "brown")),
    "sky": (_sky, ("blue", "white", "turquoise", "grey")),
    "wood": (_wood, ("brown", "orange")),
    "tiles": (_tiles, ("grey", "white")),
    "gravel": (_gravel, ("grey", "brown")),
    "mat": (_mat, ("yellow", "orange", "brown")),
    "cracked": (_cracked, ("brown", "orange", "grey")),
    "plain": (_plain, ()),
    "gradient": (_gradient, ()),
    "static": (_static, ("grey",)),
}

_CLASHES = {
    "orange": ("red", "yellow", "brown"),
    "red": ("orange", "brown", "pink"),
    "yellow": ("orange", "white"),
    "green": ("turquoise",),
    "turquoise": ("green", "blue"),
    "blue": ("purple", "turquoise"),
    "purple": ("blue",),
    "pink": ("red", "purple"),
    "brown": ("red", "orange", "black", "grey"),
    "white": ("yellow", "grey"),
    "grey": ("white", "brown"),
    "black": ("brown",),
}


def paint_paper(draws: Draws) -> GroundPaint:
    """The ground of the pretraining world and of mini_shapes: one even grey, from middling to white.

    Without any grain: normalised patch by patch, noise on an even patch would be all that a masked autoencoder is asked
    to predict of it.
    """
    level = draws.between(150, 252)
    return np.full((3, SIDE, SIDE), level, dtype=np.float32), ("white" if level > 208 else "grey",)


# The colours of objects on paper: all darker than the paper.
PLAIN_COLOURS: tuple[str, ...] = ("black", "brown", "purple")


def paint_ground(draws: Draws, name: str) -> tuple[Array, tuple[str, ...], tuple[str, ...]]:
    """Paint a ground.

    Args:
        draws: the picture's random numbers.
        name: a key of `GROUNDS`.

    Returns:
        The canvas (3, SIDE, SIDE) in [0, 255] or a little beyond; the ground's own colour names, if it has a choice of
        them; the colours an object had better not take on it.
    """
    painter, avoid = GROUNDS[name]
    canvas, colours = painter(draws)
    clashes = {other for colour in colours for other in (colour, *_CLASHES[colour])}
    return canvas, colours, tuple(sorted(clashes.union(avoid)))
