"""The four labelled sets of the mini world: shapes (in domain), digits, land cover and textures (out of domain)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from wlsup.batch import Domain, EvalSet, ImageSpec
from wlsup.data.mini_landcover import LANDCOVER_CLASSES, landcover_picture
from wlsup.data.mini_render import SHAPES, SIDE, Draws, finish, noise
from wlsup.data.mini_scenes import plain_scene
from wlsup.data.mini_textures import TEXTURE_CLASSES, texture_picture
from wlsup.errors import WlsupError, choose

__all__ = ["MINI_EVAL_SETS", "MiniPictures", "mini_eval_set", "normalised"]

# Shapes that no other class can be mistaken for after a turn or by its outline.
SHAPE_CLASSES: tuple[str, ...] = tuple(SHAPES)[:10]

_TRAIN, _TEST = 1000, 500
# First word of every seed, so that no two kinds of picture ever share a stream of random numbers.
_SALTS = {"mini_shapes": 101, "mini_digits": 102, "mini_landcover": 103, "mini_textures": 104}

Pictures = tuple[NDArray[np.uint8], NDArray[np.int64]]


def normalised(pictures: Tensor, spec: ImageSpec) -> Tensor:
    """Turn pictures into an encoder's input.

    Args:
        pictures: (B, 3, 64, 64) uint8.
        spec: what the encoder wants; at size 64 no pixel is resampled.

    Returns:
        (B, 3, spec.size, spec.size) float32.
    """
    values = pictures.float() / 255
    if spec.size != SIDE:
        values = interpolate(values, (spec.size, spec.size), mode=spec.interpolation, antialias=True).clamp(0, 1)
    return (values - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)


class MiniPictures(Dataset):
    """Labelled 64 x 64 pictures in memory.

    Args:
        pictures: (n, 3, 64, 64) uint8.
        labels: (n,) int64.
        spec: the encoder's input.
    """

    def __init__(self, pictures: Tensor, labels: Tensor, spec: ImageSpec) -> None:
        self.pictures, self.labels, self.spec = pictures, labels, spec

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A normalised picture (3, H, W) and its class id."""
        return normalised(self.pictures[index : index + 1], self.spec)[0], int(self.labels[index])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All pictures (n, 3, H, W), normalised, and their labels (n,): the fast way through the set."""
        return normalised(self.pictures, self.spec), self.labels


def _painted(
    salt: int, kinds: tuple[str, ...], paint: Callable[[Draws, str], NDArray[np.uint8]], more: int = 0
) -> Pictures:
    """Train pictures, then test pictures; classes take turns, so that every prefix is balanced."""
    labels = np.arange(_TRAIN + _TEST + more, dtype=np.int64) % len(kinds)
    pictures = [paint(Draws(salt, index), kinds[label]) for index, label in enumerate(labels.tolist())]
    return np.stack(pictures), labels


@lru_cache(maxsize=1)
def _handwritten() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    # Imported here: scikit-learn takes a second to load and only this set needs it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    # A rim of one empty cell, so that a stroke at the edge of the scan ends softly.
    framed = np.pad(digits.images, ((0, 0), (1, 1), (1, 1)))
    return (framed * 16).clip(0, 255).astype(np.float32), digits.target.astype(np.int64)


def _enlarge(digit: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    # Bilinear from 10 x 10, with weights in steps of 1/64 so that the products are exact.
    position = np.clip((np.arange(side) + 0.5) * 10 / side - 0.5, 0, 9)
    left = np.minimum(position.astype(np.int64), 8)
    share = np.rint((position - left) * 64) / 64
    weights = np.zeros((side, 10), dtype=np.float32)
    weights[np.arange(side), left] = 1 - share
    weights[np.arange(side), left + 1] = share
    return (weights @ digit @ weights.T) / np.float32(255)


def _digit_picture(draws: Draws, digit: NDArray[np.float32], beside: list[NDArray[np.float32]]) -> NDArray[np.uint8]:
    """A handwritten digit as a house number: coloured, off centre, with parts of its neighbours in sight."""
    side = 42 + draws.below(13)
    top = (SIDE - side) // 2 + draws.below(9) - 4
    left = (SIDE - side) // 2 + draws.below(9) - 4
    ink = np.zeros((SIDE, 3 * SIDE), dtype=np.float32)
    for index, picture in enumerate((digit, *beside)):
        start = SIDE + left + (0, -int(0.68 * side), int(0.68 * side))[index]
        place = ink[top : top + side, start : start + side]
        np.maximum(place, _enlarge(picture, side), out=place)
    ink = np.clip(ink[:, SIDE : 2 * SIDE] * np.float32(1.4) - np.float32(0.15), 0, 1)
    level, contrast = draws.between(170, 235), draws.between(60, 130)
    wall = np.array([level + draws.between(-25, 25) for _ in range(3)], dtype=np.float32)
    step = np.array([draws.between(-25, 25) - contrast for _ in range(3)], dtype=np.float32)
    light = (noise(draws, 2) - np.float32(0.5)) * np.float32(draws.between(0, 50))
    grain = (draws.bytes(SIDE, SIDE) / np.float32(255) - np.float32(0.5)) * np.float32(draws.between(2, 16))
    return finish(wall[:, None, None] + step[:, None, None] * ink + light + grain)


def _chosen_digits(salt: int, targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which writings are used: 150 a class, none twice; classes take turns, train first."""
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence((salt,)))).random(len(targets)).argsort()
    by_class = [order[targets[order] == kind] for kind in range(10)]
    return np.stack([members[: (_TRAIN + _TEST) // 10] for members in by_class], axis=1).reshape(-1)


def _digits(salt: int, more: int = 0) -> Pictures:
    if more:
        raise WlsupError("mini_digits has no more than 500 test pictures: people wrote only so many digits.")
    images, targets = _handwritten()
    chosen = _chosen_digits(salt, targets)
    pictures = []
    for index, number in enumerate(chosen.tolist()):
        draws = Draws(salt, index)
        part = chosen[:_TRAIN] if index < _TRAIN else chosen[_TRAIN:]
        beside = [images[int(draws.pick(part))] for _ in range(2)]
        pictures.append(_digit_picture(draws, images[number], beside))
    return np.stack(pictures), targets[chosen]


def _shapes(salt: int, more: int = 0) -> Pictures:
    return _painted(salt, SHAPE_CLASSES, lambda draws, kind: plain_scene(draws, kind).image, more)


_SETS: dict[str, tuple[Domain, tuple[str, ...], Callable[..., Pictures]]] = {
    "mini_shapes": ("in", SHAPE_CLASSES, _shapes),
    "mini_digits": ("out", tuple(str(digit) for digit in range(10)), _digits),
    "mini_landcover": (
        "out",
        tuple(LANDCOVER_CLASSES),
        lambda salt, more=0: _painted(salt, tuple(LANDCOVER_CLASSES), landcover_picture, more),
    ),
    "mini_textures": (
        "out",
        tuple(TEXTURE_CLASSES),
        lambda salt, more=0: _painted(salt, tuple(TEXTURE_CLASSES), texture_picture, more),
    ),
}

MINI_EVAL_SETS: tuple[str, ...] = tuple(_SETS)


@cache
def _pictures(name: str, more: int = 0) -> tuple[Tensor, Tensor]:
    pictures, labels = _SETS[name][2](_SALTS[name], more)
    return torch.from_numpy(pictures), torch.from_numpy(labels)


def mini_eval_set(name: str, spec: ImageSpec, more: int = 0) -> EvalSet:
    """One of the mini world's labelled sets: 1,000 train and 500 test pictures of 10 balanced classes.

    Args:
        name: one of `MINI_EVAL_SETS`.
        spec: the encoder's input; at size 64 no pixel is resampled.
        more: test pictures beyond the 500, which come first; mini_digits has none.

    Returns:
        The set; both halves are `MiniPictures`. The pictures are painted once a process (about a second a set).

    Raises:
        WlsupError: on an unknown name, or if more is asked for than there is.
    """
    choose("mini eval set", name, MINI_EVAL_SETS)
    domain, class_names, _ = _SETS[name]
    pictures, labels = _pictures(name, more)
    return EvalSet(
        name=name,
        domain=domain,
        train=MiniPictures(pictures[:_TRAIN], labels[:_TRAIN], spec),
        test=MiniPictures(pictures[_TRAIN:], labels[_TRAIN:], spec),
        class_names=class_names,
    )
