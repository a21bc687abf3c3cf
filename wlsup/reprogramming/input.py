"""Adversarial reprogramming: a learned frame of pixels around a small picture gives a frozen network another task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from wlsup.batch import ImageSpec
from wlsup.errors import WlsupError, choose
from wlsup.reprogramming.pixels import Pixels

__all__ = ["InputProgram", "InputSpec"]

_COVERS = ("frame", "all")


@dataclass(frozen=True)
class InputSpec:
    """Where the picture lies, and where the program.

    Args:
        picture_size: side in pixels to which pictures are shrunk, smaller than the canvas; None: half of it.
        cover: "frame", as published; "all" lets the program lie over the picture too (M = 1), where the sum may leave
            the range of pixels and is clamped.
    """

    picture_size: int | None = None
    cover: Literal["frame", "all"] = "frame"

    def __post_init__(self) -> None:
        choose("cover of the program", self.cover, _COVERS)


class InputProgram(nn.Module):
    """One program for all pictures: ``X_adv = X + P``, ``P = tanh(W * M)``.

    Source: Elsayed et al. 2019, "Adversarial Reprogramming of Neural Networks", equations 1 to 3. X is the small
    picture in the middle of a canvas of zeros, in [-1, 1]; M is 0 where the picture lies. W starts at 0: the canvas is
    mid-grey.

    Args:
        image_spec: the frozen network's input; [-1, 1] is mapped to pixels in [0, 1], which are then normalised as it
            says.
        spec: see `InputSpec`.

    Raises:
        WlsupError: a picture that leaves no room for the frame.
    """

    def __init__(self, image_spec: ImageSpec, spec: InputSpec = InputSpec()) -> None:
        super().__init__()
        side = image_spec.size
        self.picture_size = side // 2 if spec.picture_size is None else spec.picture_size
        if not 0 < self.picture_size < side:
            raise WlsupError(
                f"program.picture_size is {spec.picture_size}; the canvas has {side} pixels a side, and the picture "
                f"must be smaller to leave the program room: give 1 to {side - 1}."
            )
        self.start = (side - self.picture_size) // 2
        self.weight = nn.Parameter(torch.zeros(3, side, side))
        self.pixels = Pixels(image_spec)
        mask = torch.ones(1, side, side)
        if spec.cover == "frame":
            mask[self._picture] = 0
        self.register_buffer("mask", mask, persistent=False)

    @property
    def _picture(self) -> tuple:
        inside = slice(self.start, self.start + self.picture_size)
        return ..., inside, inside

    @property
    def program(self) -> Tensor:
        """P, (3, S, S) in (-1, 1)."""
        return torch.tanh(self.weight * self.mask)

    def penalty(self) -> Tensor:
        """Return the squared norm of W where it counts (the published regulariser)."""
        return (self.weight * self.mask).square().sum()

    def saturation(self) -> Tensor:
        """Return the share of the program's values beyond 0.99, where tanh passes next to no gradient."""
        active = self.mask.expand_as(self.weight).bool()
        return (self.program.detach().abs()[active] > 0.99).float().mean()

    def place(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, 3, S, S) in [-1, 1]: shrunk, in the middle, zeros around."""
        size = (self.picture_size, self.picture_size)
        small = interpolate(self.pixels.of(images), size, mode="bilinear", antialias=True).clamp(0, 1)
        canvas = small.new_zeros(len(images), *self.weight.shape)
        canvas[self._picture] = 2 * small - 1
        return canvas

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Put the program around pictures.

        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            The frozen network's input (B, 3, S, S), normalised, and the share of values that were clamped.
        """
        return self.pixels.normalised((self.place(images) + self.program + 1) / 2)
