"""From an encoder's input to pixels in [0, 1] and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wlsup.batch import ImageSpec

__all__ = ["Pixels"]


class Pixels(nn.Module):
    """An encoder's normalisation, both ways.

    Args:
        spec: the encoder's.
    """

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    def of(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> values of pixels, [0, 1] where it was a picture."""
        return images * self.std + self.mean

    def normalised(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Clamp pixels to [0, 1], as a picture can hold no others, and normalise them.

        Args:
            pixels: (B, 3, H, W).

        Returns:
            The encoder's input (B, 3, H, W), and the share of values that lay outside, which get no gradient.
        """
        outside = ((pixels < 0) | (pixels > 1)).float().mean().detach()
        return (pixels.clamp(0, 1) - self.mean) / self.std, outside
