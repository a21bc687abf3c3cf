"""Random masking: which patches a masked autoencoder keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from wlsup.draws import per_sample
from wlsup.errors import WlsupError

__all__ = ["masking_noise", "random_masking"]


def random_masking(
    batch_size: int,
    num_patches: int,
    mask_ratio: float,
    noise: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose for each sample which patches to keep: those with the smallest noise.

    Source: He et al. 2022; ``models_mae.py`` ``random_masking``.

    Args:
        batch_size: B.
        num_patches: N.
        mask_ratio: share of patches removed, in [0, 1); int(N * (1 - mask_ratio)) stay, at least 1.
        noise: (B, N) to decide by, for an exact replay; None: drawn uniformly.
        device: where to draw, when ``noise`` is None.
        generator: what to draw from, when ``noise`` is None.

    Returns:
        ids_keep (B, K), ids_restore (B, N), mask (B, N) fp32 with 1 where removed.

    Raises:
        WlsupError: a ratio out of range or one that keeps nothing, or noise of another shape.
    """
    keep = int(num_patches * (1 - mask_ratio)) if 0 <= mask_ratio < 1 else 0
    if keep < 1:
        raise WlsupError(
            f"mask_ratio {mask_ratio} keeps none of {num_patches} patches; "
            f"allowed: 0 <= mask_ratio <= {1 - 1 / num_patches:.4g}."
        )
    if noise is None:
        noise = masking_noise(batch_size, num_patches, device=device, generator=generator)
    if noise.shape != (batch_size, num_patches):
        raise WlsupError(f"Mask noise has shape {tuple(noise.shape)}; wanted (B, N) = ({batch_size}, {num_patches}).")
    ids_shuffle = noise.argsort(dim=1, stable=True)
    places = torch.arange(num_patches, device=noise.device).expand_as(ids_shuffle)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, places)
    return ids_shuffle[:, :keep], ids_restore, (ids_restore >= keep).float()


def masking_noise(
    batch_size: int,
    num_patches: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return what `random_masking` decides by, (B, N) uniform in [0, 1); its arguments are that one's."""
    return per_sample(
        lambda samples, stream: torch.rand(samples, num_patches, device=device, generator=stream),
        batch_size,
        device,
        generator,
    )
