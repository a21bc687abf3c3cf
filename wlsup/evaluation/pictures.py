"""Pictures of what a model does, as tensors; the callbacks log them and the report embeds them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wlsup.batch import ImageSpec

__all__ = ["denormalised", "reconstruction_grid"]


def denormalised(image: Tensor, spec: ImageSpec) -> np.ndarray:
    """Return a picture as it was before the encoder's normalisation, (H, W, 3) uint8.

    Args:
        image: (3, H, W), normalised.
        spec: by which.
    """
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (spec.std, spec.mean))
    pixels = (image.float().cpu() * scale + shift).clamp(0, 1)
    return (255 * pixels).round().byte().permute(1, 2, 0).numpy()


def reconstruction_grid(
    images: Tensor,
    predicted: Tensor,
    mask: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    least_side: int = 128,
) -> Tensor:
    """Lay out one row a picture: input, masked, prediction, and prediction pasted into what was seen.

    Source: He et al. 2022 (MAE), figure 2, with the pasted column of its demo.

    Args:
        images: (B, 3, H, W), normalised.
        predicted: (B, 3, H, W), normalised likewise.
        mask: (B, N), 1 where a patch was hidden, N = (H / patch_size) * (W / patch_size) in raster order.
        patch_size: side of a patch in pixels.
        mean: of the normalisation, per channel.
        std: of the normalisation, per channel.
        least_side: small pictures are enlarged, by whole factors and without smoothing, to at least this many pixels.

    Returns:
        (3, rows, columns) in [0, 1], with white lines between the pictures.
    """
    height, width = images.shape[-2:]
    rows, columns = height // patch_size, width // patch_size
    hidden = mask.reshape(-1, 1, rows, columns).to(images.dtype)
    hidden = hidden.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
    grey = torch.zeros_like(images)
    strip = torch.stack(
        [images, images * (1 - hidden) + grey * hidden, predicted, images * (1 - hidden) + predicted * hidden], dim=1
    )
    scale = images.new_tensor(std).view(3, 1, 1)
    shift = images.new_tensor(mean).view(3, 1, 1)
    strip = (strip * scale + shift).clamp(0, 1)
    factor = max(1, -(-least_side // height))
    strip = strip.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    strip = torch.nn.functional.pad(strip, (2, 2, 2, 2), value=1.0)
    return torch.cat([torch.cat(list(row), dim=-1) for row in strip], dim=-2).float().cpu()
