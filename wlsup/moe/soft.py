"""Soft routing: experts read mixtures of tokens, tokens read mixtures of what the experts made of them.

Shapes: B samples, L positions, D width, E experts, S slots an expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlsup.moe.router import jittered
from wlsup.moe.spec import MoESpec

__all__ = ["SoftRouter"]


class SoftRouter(nn.Module):
    """Two softmaxes of the same logits: over a sample's tokens to fill slots, over slots to read them.

    Source: Puigcerver et al. 2024, "From Sparse to Soft Mixtures of Experts", section 2.1, with the normalisation of
    section 2.3: x and each slot's vector have unit length, and one learned scale, 1 at first, multiplies the slots'.
    Nothing is dropped and there is nothing to balance. Upcycling does not preserve the function: slots are mixtures.

    Args:
        width: D.
        spec: the mixture.
        number: of the layer, for its draws; see `MoE`.
    """

    def __init__(self, width: int, spec: MoESpec, number: int = 0) -> None:
        super().__init__()
        self.spec, self.number = spec, number
        self.weight = nn.Parameter(torch.empty(spec.experts * spec.slots, width))
        nn.init.normal_(self.weight, std=spec.init_std)  # of which only the direction counts
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how slots are filled and read.

        Args:
            x: (B, L, D).
            mask: (B, L) bool; padding fills no slot.

        Returns:
            Dispatch weights (B, L, E S), which add up to 1 over the tokens of a sample (0 in a sample of padding only);
            combine weights (B, L, E S), which add up to 1 over the slots, 0 at padding; the logits (B, L, E S).
        """
        coarse, device = self.spec.router_dtype == "model", x.device.type
        dtype = self.weight.dtype if coarse else torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(device, enabled=coarse and torch.is_autocast_enabled(device)):
            if self.training:
                x = jittered(x, self.spec.jitter, self.number)
            logits = F.linear(F.normalize(x.to(dtype), dim=-1), self.scale * F.normalize(self.weight.to(dtype), dim=-1))
        filling = logits.masked_fill(~mask[..., None], -math.inf).softmax(1).nan_to_num(0.0)
        reading = logits.softmax(-1) * mask[..., None]
        return filling, reading, logits
