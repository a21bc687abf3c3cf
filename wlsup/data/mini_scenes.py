"""Scenes of the mini world: which objects stand where, and their pictures.

Two kinds. A *caption scene* (the COCO of the mini world) has one to four objects of any texture in relations on any
ground. A *plain scene* (its ImageNet: what the encoder is pretrained on) has one plain, dark object on an
even ground and belongs to the domain of ``mini_shapes``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wlsup.data.mini_grounds import COLOURS, GROUNDS, PLAIN_COLOURS, colour_near, paint_ground, paint_paper
from wlsup.data.mini_render import PATTERNS, SHAPES, Array, Draws, blend, coverage, finish, local_axes, rgb, window

__all__ = ["TEXTURES", "Scene", "SceneObject", "caption_scene", "paint_object", "plain_scene"]

TEXTURES: tuple[str, ...] = ("plain", *PATTERNS, "outlined")

_RADII = {"small": (5.0, 6.4), "medium": (8.4, 11.2), "large": (14.2, 18.0)}
# Shapes whose middle is filled to well over half the radius: something can lie inside them, or overlap them for sure.
_SOLID = ("circle", "square", "hexagon", "flower")
# Shapes with thin parts, which a busy texture would make hard to read.
_THIN = ("arrow", "crescent", "star", "triangle", "ring", "drop")
# Shapes with room for an outline even when small.
_STOUT = ("circle", "square", "hexagon", "heart", "half circle", "oval")
_MARGIN = 1.5


@dataclass(frozen=True)
class SceneObject:
    """One object: its names, as captions may use them, and its geometry in pixels."""

    shape: str
    colour: str
    size: str
    texture: str
    texture_colour: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass
class Scene:
    """A picture and everything that is true of it.

    Args:
        image: (3, 64, 64) uint8.
        objects: in painting order: later ones cover earlier ones.
        ground: a key of `GROUNDS`.
        ground_colours: the ground's own colours where it has a choice of them.
        dim: True when the scene is poorly lit.
        inside: (i, j) where object i lies inside object j.
        overlap: (i, j) where object i covers a part of object j.
    """

    image: NDArray[np.uint8]
    objects: list[SceneObject]
    ground: str
    ground_colours: tuple[str, ...]
    dim: bool = False
    inside: list[tuple[int, int]] = field(default_factory=list)
    overlap: list[tuple[int, int]] = field(default_factory=list)


def paint_object(
    canvas: Array,
    draws: Draws,
    thing: SceneObject,
    *,
    shadow: float = 0.0,
    shading: float = 1.0,
    contrast: float = 1.0,
) -> None:
    """Paint one object, in place.

    Args:
        canvas: (3, 64, 64) float32.
        draws: the picture's random numbers (the exact tint, the phase of a texture).
        thing: what to paint.
        shadow: darkness in [0, 1] of the shadow it casts.
        shading: strength in [0, 1] of the light that falls on it from one side.
        contrast: strength in [0, 1] of its texture.
    """
    radius = thing.radius
    where = window(thing.x, thing.y, radius * 1.25 + 2)
    u, v = local_axes(where, thing.x, thing.y, thing.angle)
    distance = SHAPES[thing.shape](u / radius, v / radius) * radius
    alpha = coverage(distance)
    if shadow:
        offset = 2
        cast = np.zeros_like(alpha)
        cast[offset:, offset:] = alpha[:-offset, :-offset]
        blend(canvas, where, cast * shadow, rgb(10, 10, 16))
    light = 1 + shading * (0.06 - (u - v) / radius * draws.between(0.05, 0.15))
    paint = colour_near(draws, thing.colour) * light
    if thing.texture in PATTERNS:
        period = max(4.2, radius * draws.between(0.5, 0.68))
        mask = PATTERNS[thing.texture](u + draws.between(0, period), v + draws.between(0, period), period)
        if thing.texture == "ringed":
            mask = PATTERNS["ringed"](u, v, period)
        paint = paint + (colour_near(draws, thing.texture_colour) - paint) * (mask * contrast)
    elif thing.texture == "outlined":
        edge = coverage(-distance - max(1.4, radius * 0.17)) * contrast
        paint = paint + (colour_near(draws, thing.texture_colour) - paint) * edge
    blend(canvas, where, alpha, paint)


def _light(canvas: Array, draws: Draws, gain: float) -> NDArray[np.uint8]:
    grain = (draws.bytes(1, 64, 64) / np.float32(255) - np.float32(0.5)) * np.float32(6)
    return finish(canvas * np.float32(gain) + grain)


def _second_colour(draws: Draws, colour: str, avoid: tuple[str, ...]) -> str:
    options = [name for name in ("white", "black", "yellow") if name != colour and name not in avoid]
    if colour == "white":
        options = [name for name in options if name != "yellow"]
    if colour == "brown" or colour == "grey":
        options = [name for name in options if name != "black"] or ["yellow"]
    return draws.pick(options) if options else ("black" if colour != "black" else "white")


def _texture(draws: Draws, shape: str, size: str) -> str:
    """A texture that such an object can carry and still be told by its shape and colour."""
    if size == "small":
        return "outlined" if shape in _STOUT else "plain"
    return draws.pick(("striped", "dotted", "outlined") if shape in _THIN else TEXTURES[1:])


def _choose_sizes(draws: Draws, count: int, nested: bool, joined: bool) -> list[str]:
    if nested:
        sizes = ["large", "small"] + [draws.pick(("small", "medium")) for _ in range(count - 2)]
    elif count == 1:
        sizes = [draws.pick(("small", "medium", "large", "large"))]
    else:
        sizes = [draws.pick(("small", "medium", "large")), *(draws.pick(("small", "medium")) for _ in range(count - 1))]
    if joined and sizes[0] == "small":
        sizes[0] = "medium"
    return sizes


def _place(draws: Draws, radii: list[float], nested: bool, joined: bool) -> list[tuple[float, float]] | None:
    spots: list[tuple[float, float]] = []
    for index, radius in enumerate(radii):
        for _ in range(24):
            x = draws.between(radius + _MARGIN, 64 - radius - _MARGIN)
            y = draws.between(radius + _MARGIN, 64 - radius - _MARGIN)
            if index == 1 and nested:
                x, y = spots[0][0] + draws.between(-1.5, 1.5), spots[0][1] + draws.between(-1.5, 1.5)
                spots.append((x, y))
                break
            if index == 1 and joined:
                # On a circle around the first: at 0.66 of touching two solid shapes overlap and neither is hidden.
                dx, dy = draws.between(-1, 1), draws.between(-1, 1)
                length = max((dx * dx + dy * dy) ** 0.5, 0.2)
                reach = 0.66 * (radii[0] + radius) / length
                x, y = spots[0][0] + dx * reach, spots[0][1] + dy * reach
                if min(x, y) < radius + _MARGIN or max(x, y) > 64 - radius - _MARGIN:
                    continue
                spots.append((x, y))
                break
            apart = [
                (x - other[0]) ** 2 + (y - other[1]) ** 2 > (1.12 * (radius + radii[j]) + 1.5) ** 2
                for j, other in enumerate(spots)
            ]
            if all(apart):
                spots.append((x, y))
                break
        else:
            return None
    return spots


def _turned(draws: Draws, shape: str, freedom: float) -> float:
    # A bar may lie or stand; an arrow, a heart or a half circle keeps roughly upright so that its name stays plain.
    if shape in ("bar", "oval"):
        return draws.pick((0.0, 0.785, 1.571, 2.356)) + draws.between(-0.2, 0.2)
    if shape == "crescent":
        return draws.pick((0.0, 3.1416)) + draws.between(-0.4, 0.4)
    return draws.between(-freedom, freedom)


def caption_scene(draws: Draws) -> Scene:
    """Compose and paint one caption scene."""
    ground = draws.pick(tuple(GROUNDS))
    canvas, ground_colours, avoid = paint_ground(draws, ground)
    dice = draws.unit()
    wanted = 1 if dice < 0.28 else 2 if dice < 0.64 else 3 if dice < 0.87 else 4
    dice = draws.unit()
    nested, joined = wanted > 1 and dice < 0.2, wanted > 1 and 0.2 <= dice < 0.4
    sizes, radii, spots = [], [], None
    while spots is None:
        sizes = _choose_sizes(draws, wanted, nested, joined)
        radii = [draws.between(*_RADII[size]) for size in sizes]
        spots = _place(draws, radii, nested, joined)
    shapes = draws.sample(tuple(SHAPES), wanted)
    if nested:
        shapes[0] = draws.pick((*_SOLID, "ring"))
    if joined:
        shapes[0], shapes[1] = draws.sample(_SOLID, 2)
    elif wanted > 1 and not nested and draws.chance(0.3):
        shapes[:2] = [shapes[0]] * 2
        if wanted > 2 and draws.chance(0.4):
            shapes[2] = shapes[0]
    allowed = [name for name in COLOURS if name not in avoid]
    colours = draws.sample(allowed, wanted)
    if not nested and not joined and draws.chance(0.12):
        colours = [colours[0]] * wanted
    if nested and shapes[0] == shapes[1]:
        shapes[1] = "star"
    objects = []
    for index in range(wanted):
        texture = "plain"
        if not draws.chance(0.38):
            texture = _texture(draws, shapes[index], sizes[index])
        if nested and index == 0:
            texture = draws.pick(("plain", "outlined"))
        objects.append(
            SceneObject(
                shape=shapes[index],
                colour=colours[index],
                size=sizes[index],
                texture=texture,
                texture_colour=_second_colour(draws, colours[index], avoid),
                x=spots[index][0],
                y=spots[index][1],
                radius=radii[index],
                angle=_turned(draws, shapes[index], 0.28),
            )
        )
    shadow = draws.between(0.2, 0.45) if draws.chance(0.6) else 0.0
    for thing in objects:
        paint_object(canvas, draws, thing, shadow=shadow)
    dim = draws.chance(0.12)
    image = _light(canvas, draws, draws.between(0.46, 0.55) if dim else draws.between(0.94, 1.04))
    return Scene(image, objects, ground, ground_colours, dim, [(1, 0)] if nested else [], [(1, 0)] if joined else [])


def plain_scene(draws: Draws, shape: str | None = None) -> Scene:
    """Compose and paint one plain scene.

    Args:
        draws: the picture's random numbers.
        shape: of the only object; None for a pretraining picture: an object of any shape.
    """
    canvas, ground_colours = paint_paper(draws)
    spots, radii = None, []
    while spots is None:
        radii = [draws.between(13, 18)]
        spots = _place(draws, radii, False, False)
    colour = draws.sample(PLAIN_COLOURS, 1)[0]
    kind = shape or draws.pick(tuple(SHAPES))
    thing = SceneObject(
        shape=kind,
        colour=colour,
        size="large",
        texture="plain",
        texture_colour=_second_colour(draws, colour, ()),
        x=spots[0][0],
        y=spots[0][1],
        radius=radii[0],
        angle=_turned(draws, kind, 0.26),
    )
    paint_object(canvas, draws, thing, shading=0.0, contrast=0.3)
    return Scene(finish(canvas), [thing], "plain", ground_colours)
