"""Projections into the shared space in which pictures and captions are compared."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["ContrastiveHead"]


class ContrastiveHead(nn.Module):
    """Linear projections of both towers onto a shared unit sphere, with the loss's scale (and bias).

    Source: Radford et al. 2021 (CLIP), section 2.3: ``logit_scale`` starts at ln(1/0.07). For SigLIP (Zhai et al. 2023,
    section 3.1) at ln 10, with ``logit_bias`` at -10.

    Args:
        image_width: channels of the picture feature.
        text_width: channels of the caption feature.
        width: channels of the shared space.
        objective: whose initial scale and bias to take.
    """

    def __init__(
        self, image_width: int, text_width: int, width: int, objective: Literal["infonce", "siglip"] = "infonce"
    ) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, width, bias=False)
        self.text = nn.Linear(text_width, width, bias=False)
        for projection in (self.image, self.text):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        siglip = objective == "siglip"
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0) if siglip else math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if siglip else None

    def embed_images(self, pooled: Tensor) -> Tensor:
        """(B, image_width) -> (B, width), of unit length, in fp32."""
        return nn.functional.normalize(self.image(pooled).float(), dim=-1)

    def embed_captions(self, pooled: Tensor) -> Tensor:
        """(B, text_width) -> (B, width), of unit length, in fp32."""
        return nn.functional.normalize(self.text(pooled).float(), dim=-1)
