"""From a uint8 picture to what an encoder wants: keyed random crops for training, a fixed crop for evaluation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from wlsup.batch import ImageSpec
from wlsup.data.decoders import JpegPicture, check_decoder
from wlsup.data.resize import resized_crop
from wlsup.errors import WlsupError, choose

__all__ = ["EvalTransform", "TrainTransform", "normalize", "random_crop_box"]

_MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def _mode(spec: ImageSpec) -> InterpolationMode:
    return _MODES[choose("interpolation", spec.interpolation, _MODES)]


def random_crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    stream: random.Random,
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop.

    Source: Szegedy et al. 2015 (Inception), as in torchvision's ``RandomResizedCrop``: ten tries at an area fraction
    uniform in ``scale`` and an aspect ratio log-uniform in ``ratio``, then the largest centred box of allowed ratio.

    Args:
        height: of the picture, in pixels.
        width: likewise.
        scale: lowest and highest fraction of the area.
        ratio: lowest and highest width over height.
        stream: where the draws come from.

    Returns:
        (top, left, height, width) in pixels.
    """
    draw = stream.random
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw())
        aspect = math.exp(log_low + (log_high - log_low) * draw())
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(draw() * (height - box_height + 1)), int(draw() * (width - box_width + 1))
            return top, left, box_height, box_width
    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, and optionally a horizontal flip, keyed by the stream that is passed in.

    Args:
        spec: the encoder's `ImageSpec`.
        scale: lowest and highest area fraction of the crop, in (0, 1].
        horizontal_flip: flip half the pictures. Off by default: captions say "left" and "right".
        ratio: lowest and highest aspect ratio of the crop.
        decoder: what decodes JPEGs that come undecoded, one of `wlsup.data.decoders.DECODERS`.

    Raises:
        WlsupError: if ``scale`` is no interval in (0, 1], or the decoder is not there.
    """

    spec: ImageSpec
    scale: tuple[float, float] = (0.4, 1.0)
    horizontal_flip: bool = False
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    decoder: str = "auto"

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise WlsupError(f"crop_scale={list(self.scale)}: give two numbers, 0 < lowest <= highest <= 1.")
        _mode(self.spec)
        check_decoder(self.decoder)

    def __call__(self, picture: Tensor | JpegPicture, stream: random.Random) -> Tensor:
        """(3, H, W) uint8, decoded or not -> (3, size, size) uint8; Raises `UnreadableImage` in decoding."""
        box = random_crop_box(picture.shape[-2], picture.shape[-1], self.scale, self.ratio, stream)
        size, mode = self.spec.size, _mode(self.spec)
        if isinstance(picture, JpegPicture):
            view = picture.resized_crop(*box, size, mode, self.decoder)
        else:
            view = resized_crop(picture, *box, size, mode)
        # Drawn even when flips are off, so that switching them on changes no crop.
        flip = stream.random() < 0.5
        return view.flip(-1) if self.horizontal_flip and flip else view


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side, then crop the centre.

    Args:
        spec: the encoder's `ImageSpec`.

    Raises:
        WlsupError: if ``spec.resize`` is below ``spec.size``: the crop would be padded with black.
    """

    spec: ImageSpec

    def __post_init__(self) -> None:
        if self.spec.resize < self.spec.size:
            raise WlsupError(
                f"ImageSpec resize={self.spec.resize} is below size={self.spec.size}, so the centre crop would have "
                f"black borders. Set resize to at least {self.spec.size}."
            )
        _mode(self.spec)

    def __call__(self, picture: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (3, size, size) uint8."""
        resized = vision.resize(picture, [self.spec.resize], interpolation=_mode(self.spec), antialias=True)
        return vision.center_crop(resized, [self.spec.size, self.spec.size])


def normalize(pictures: Tensor | Sequence[Tensor], spec: ImageSpec) -> Tensor:
    """Scale uint8 pictures to [0, 1], subtract the mean and divide by the standard deviation.

    Args:
        pictures: (3, H, W) or (B, 3, H, W) uint8, or a sequence of B (3, H, W) to be stacked.
        spec: gives mean and std.

    Returns:
        float32 of the same shape.
    """
    if isinstance(pictures, Tensor):
        scaled = vision.to_dtype(pictures, torch.float32, scale=True)
    else:
        # Straight into the batch: views come in channels-last order, and stacking them as bytes would turn them twice.
        scaled = torch.empty(len(pictures), *pictures[0].shape)
        for row, picture in zip(scaled, pictures, strict=True):
            row.copy_(picture)
        scaled.mul_(1 / 255)  # as torchvision's to_dtype
    return vision.normalize(scaled, list(spec.mean), list(spec.std), inplace=True)
