"""Houlsby's bottleneck adapter, its hidden layer shifted by the caption."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from wlsup.adapters.base import Adapter, ConditionEmbedding, register, top_blocks
from wlsup.batch import ConditionSlot

__all__ = ["Bottleneck", "BottleneckAdapter"]


class Bottleneck(nn.Module):
    """``x + W_up gelu(W_down x + W_condition c)``: down to ``hidden`` channels, back up, added to the input.

    Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1. Theirs starts near the
    identity (normal, std 1e-3); ours starts at it: kaiming down, zero up (never both zero: that is a saddle at which
    neither has a gradient). The condition term is ours; without it there are ``2 * hidden * width + hidden + width``
    parameters, as published.

    Args:
        width: D.
        hidden: channels of the bottleneck.
        embedding_width: channels of the condition embedding; 0 for an unconditioned adapter.
    """

    def __init__(self, width: int, hidden: int, embedding_width: int = 0) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.condition = nn.Linear(embedding_width, hidden, bias=False) if embedding_width else None
        self.up = nn.Linear(hidden, width)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, L, D) and (B or 1, embedding_width) -> (B, L, D)."""
        hidden = self.down(x)
        if self.condition is not None and embedding is not None:
            hidden = hidden + self.condition(embedding)[:, None]
        return x + self.up(nn.functional.gelu(hidden))

    def update_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return (D, hidden) and (hidden, D), whose product is the change's linear part: what spectra are taken of."""
        return self.up.weight, self.down.weight


@register("bottleneck")
class BottleneckAdapter(Adapter):
    """A `Bottleneck` on the attention's and on the MLP's output of every block, before the residual addition.

    Source: Houlsby et al. 2019, figure 2. In a pre-norm ViT the adapter acts on the branch output, as there.

    Args:
        width: D, channels of the encoder's tokens.
        depth: number of the encoder's blocks.
        condition_width: C, channels of the pooled caption feature.
        hidden: channels of each bottleneck (Houlsby et al. use 64 at D = 768).
        embedding_width: channels of the shared condition embedding.
        top: how many blocks get them, counted from the last; None: all.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        condition_width: int,
        hidden: int = 64,
        embedding_width: int = 64,
        top: int | None = None,
    ) -> None:
        super().__init__(width, depth, condition_width)
        self.adapted = top_blocks(depth, top)
        self.embedding = ConditionEmbedding(condition_width, embedding_width)
        self.bottlenecks = nn.ModuleList(
            Bottleneck(width, hidden, embedding_width) for _ in range(2 * len(self.adapted))
        )

    def sites(self, encoder: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor, ConditionSlot], Tensor]]]:
        """Yield each adapted block's attention and MLP, in order, with the site's bottleneck."""
        branches = [branch for block in (encoder.blocks[i] for i in self.adapted) for branch in (block.attn, block.mlp)]
        for branch, bottleneck in zip(branches, self.bottlenecks, strict=True):
            yield branch, self._through(bottleneck)

    def _through(self, bottleneck: Bottleneck) -> Callable[[Tensor, ConditionSlot], Tensor]:
        return lambda x, slot: bottleneck(x, slot.embedded(self.embedding))
