"""FiLM: the caption scales and shifts every channel of the encoder's normalised activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from wlsup.adapters.base import Adapter, ConditionEmbedding, register, top_blocks
from wlsup.batch import ConditionSlot

__all__ = ["FiLM"]


@register("film")
class FiLM(Adapter):
    """Feature-wise linear modulation of a ViT: ``x <- (1 + dgamma(c)) * x + beta(c)`` after each block's two norms.

    Source: Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer", equations 1-2, with gamma
    written as 1 + dgamma as its code does. Placing it after the norms (as in DiT's AdaLN, Peebles & Xie 2023) and the
    zero initialisation, which makes it an exact identity at step 0, are ours. Under the null condition it is a learned
    scale and shift per channel, as in SSF (Lian et al. 2022).

    Parameters per site: ``(embedding_width + 1) * 2 * width``.

    Args:
        width: D, channels of the encoder's tokens.
        depth: number of the encoder's blocks.
        condition_width: C, channels of the pooled caption feature.
        embedding_width: channels of the shared condition embedding that each site's generator reads.
        top: how many blocks are modulated, counted from the last; None: all.
    """

    def __init__(
        self, width: int, depth: int, condition_width: int, embedding_width: int = 64, top: int | None = None
    ) -> None:
        super().__init__(width, depth, condition_width)
        self.adapted = top_blocks(depth, top)
        self.embedding = ConditionEmbedding(condition_width, embedding_width)
        self.generators = nn.ModuleList(nn.Linear(embedding_width, 2 * width) for _ in range(2 * len(self.adapted)))
        for generator in self.generators:
            nn.init.zeros_(generator.weight)
            nn.init.zeros_(generator.bias)

    def sites(self, encoder: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor, ConditionSlot], Tensor]]]:
        """Yield each adapted block's two norms, in order, with the site's modulation."""
        for norm, generator in zip(self._norms(encoder), self.generators, strict=True):
            yield norm, self._modulation(generator)

    @torch.no_grad()
    def fold(self, encoder: nn.Module) -> bool:
        """Scale and shift the norms' own weights: ``(1 + dgamma) (w n + b) + beta = ((1 + dgamma) w) n + ...``."""
        norms = self._norms(encoder)
        if any(not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None for norm in norms):
            return False
        embedded = self.embedding(None)
        for norm, generator in zip(norms, self.generators, strict=True):
            delta_gamma, beta = (part.double() for part in generator(embedded)[0].chunk(2))
            weight, bias = (1 + delta_gamma) * norm.weight, (1 + delta_gamma) * norm.bias + beta
            norm.weight, norm.bias = (nn.Parameter(part.to(norm.weight.dtype), False) for part in (weight, bias))
        return True

    def _norms(self, encoder: nn.Module) -> list[nn.Module]:
        return [norm for block in (encoder.blocks[i] for i in self.adapted) for norm in (block.norm1, block.norm2)]

    def _modulation(self, generator: nn.Module) -> Callable[[Tensor, ConditionSlot], Tensor]:
        def modulate(x: Tensor, slot: ConditionSlot) -> Tensor:
            """(B, L, D) -> (B, L, D)."""
            delta_gamma, beta = generator(slot.embedded(self.embedding))[:, None].chunk(2, dim=-1)
            return x + x * delta_gamma + beta

        return modulate
