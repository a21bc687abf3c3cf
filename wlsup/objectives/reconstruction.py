"""Masked reconstruction: patches, the loss on the removed ones, and pictures of what was predicted.

Shapes: B samples, N = H/p * W/p patches row by row from the top left, p the patch size in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = ["paste_prediction", "patchify", "reconstruction_loss", "unnormalize_patches", "unpatchify"]

# Inside the square root, as FAIR's code has it.
_EPSILON = 1e-6


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut pictures into patches, channel-last inside a patch (FAIR's order: row, column, channel).

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; ``models_mae.py`` ``patchify``.

    Args:
        images: (B, C, H, W), H and W multiples of ``patch_size``.
        patch_size: p, in pixels.

    Returns:
        (B, N, p * p * C).

    Raises:
        WlsupError: the size is not a multiple of the patch size.
    """
    if images.ndim != 4 or patch_size < 1 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise WlsupError(
            f"Pictures of shape {tuple(images.shape)} do not cut into patches of {patch_size}: "
            "give (B, C, H, W) with H and W multiples of the patch size."
        )
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cells = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, patch_size: int, size: tuple[int, int] | None = None) -> Tensor:
    """Put patches back together; the inverse of `patchify`.

    Args:
        patches: (B, N, p * p * C).
        patch_size: p, in pixels.
        size: (H, W) of the picture; None: a square one.

    Returns:
        (B, C, H, W).

    Raises:
        WlsupError: N patches do not make up the size, or the last dimension is not whole pixels.
    """
    batch, count, length = patches.shape
    side = round(count**0.5)
    rows, columns = (side, side) if size is None else (size[0] // patch_size, size[1] // patch_size)
    if rows * columns != count or length % (patch_size * patch_size):
        raise WlsupError(
            f"{count} patches of {length} values do not make a picture of {size or 'square'} size with patches of "
            f"{patch_size} pixels; give `size` as (H, W) for pictures that are not square."
        )
    cells = patches.reshape(batch, rows, columns, patch_size, patch_size, length // (patch_size * patch_size))
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch_size, columns * patch_size)


def reconstruction_loss(
    prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize_pixels: bool = True
) -> Tensor:
    """Mean squared error of the pixels, averaged over the removed patches.

    Source: He et al. 2022, section 3 "Reconstruction target"; ``models_mae.py`` ``forward_loss``. With
    ``normalize_pixels`` the target of a patch is (x - mean) / sqrt(var + 1e-6), var the *unbiased* variance of its
    pixels, so that a prediction of all zeros costs (n - 1) / n, n = p * p * C (767/768 for 16 x 16 x 3).

    Args:
        prediction: (B, N, p * p * C); computed in fp32 whatever its dtype.
        images: (B, C, H, W), as the encoder saw them.
        mask: (B, N), 1 where the patch was removed. With no patch removed the loss is 0.
        patch_size: p, in pixels.
        normalize_pixels: whether targets are normalised patch by patch.

    Returns:
        A scalar, fp32.

    Raises:
        WlsupError: shapes that do not belong together.
    """
    target = patchify(images, patch_size)
    if prediction.shape != target.shape or mask.shape != target.shape[:2]:
        raise WlsupError(
            f"Prediction {tuple(prediction.shape)} and mask {tuple(mask.shape)} do not belong to pictures of shape "
            f"{tuple(images.shape)} in patches of {patch_size}: wanted {tuple(target.shape)} and "
            f"{tuple(target.shape[:2])}."
        )
    # fp16 overflows in the squares, and autocast would not lift it.
    with torch.autocast(device_type=prediction.device.type, enabled=False):
        target = target.detach().float()
        if normalize_pixels:
            mean, scale = _patch_statistics(target)
            target = (target - mean) / scale
        error = (prediction.float() - target).square().mean(dim=-1)
        removed = mask.to(error.dtype)
        return (error * removed).sum() / removed.sum().clamp(min=1.0)


def unnormalize_patches(prediction: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Undo the targets' normalisation with each patch's own statistics, which only a picture at hand can give.

    Args:
        prediction: (B, N, p * p * C), of a model trained with normalised pixels.
        images: (B, C, H, W), the pictures predicted.
        patch_size: p, in pixels.

    Returns:
        (B, N, p * p * C) in the pictures' own scale.
    """
    mean, scale = _patch_statistics(patchify(images, patch_size).float())
    return prediction.float() * scale + mean


def paste_prediction(
    prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize_pixels: bool = True
) -> Tensor:
    """Paste the predicted patches into the pictures they were removed from, for people to look at.

    Args:
        prediction: (B, N, p * p * C).
        images: (B, C, H, W), normalised by the encoder's ImageSpec.
        mask: (B, N), 1 where the patch was removed.
        patch_size: p, in pixels.
        normalize_pixels: whether the model predicts normalised pixels.

    Returns:
        (B, C, H, W): visible patches as they are, removed ones as predicted, in the pictures' own scale.
    """
    predicted = unnormalize_patches(prediction, images, patch_size) if normalize_pixels else prediction.float()
    patches = torch.where(mask[..., None].bool(), predicted, patchify(images, patch_size).float())
    return unpatchify(patches, patch_size, (images.shape[2], images.shape[3]))


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, n) -> mean and sqrt(unbiased variance + epsilon), (B, N, 1) each."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + _EPSILON).sqrt()
