"""Ladder side tuning: a small network beside the frozen encoder, through which alone gradients flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wlsup.adapters.base import Adapter, ConditionEmbedding, register
from wlsup.batch import ConditionSlot
from wlsup.errors import WlsupError, choose

__all__ = ["Ladder"]

TEMPERATURE = 0.1
"""Of the gates ``mu_i = sigmoid(alpha_i / T)``."""


@register("ladder")
class Ladder(Adapter):
    """A side network that reads every block's output and adds to the encoder's last, or takes its place.

        g_0 = D_0(emb) + W c          g_i = side_i(mu_i g_{i-1} + (1 - mu_i) D_i(f_i))

    with ``f_i`` the i-th block's tokens, ``D_i`` linear maps down to the side width, ``mu_i = sigmoid(alpha_i / 0.1)``,
    1/2 at first. Nothing of the side network enters the encoder, so the backward pass never goes through the encoder
    and none of its activations is kept but the ``f_i``; of the side network itself only the ``g_i`` are, the rest is
    computed again when its turn comes (ours: it is an eighth as wide, so that costs little).

    Source: Sung et al. 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", section
    3.2. The paper's output is ``U(LN(g_L))`` in place of the encoder's: at step 0 nothing of the pretrained features is
    left. The residual form ``norm(f_L) + s U(LN(g_L))`` with ``U`` zero at first, an exact identity at step 0, is ours,
    and so is the caption's embedding ``c``, learned where there is no caption. The paper takes the side network's first
    weights from the pruned encoder; here they are drawn afresh.

    Args:
        width: D, channels of the encoder's tokens.
        depth: number of the encoder's blocks.
        condition_width: C, channels of the pooled caption feature.
        reduction: the side network is D / reduction wide (8 in the paper).
        embedding_width: channels of the condition embedding.
        form: "residual" (ours) or "replace" (the paper's).
        layers: positions of the blocks that have a rung; None: all. The paper drops some.

    Raises:
        WlsupError: a reduction that leaves no channel, an unknown form, or layers that are not positions of blocks.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        condition_width: int,
        reduction: int = 8,
        embedding_width: int = 64,
        form: Literal["residual", "replace"] = "residual",
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(width, depth, condition_width)
        if not 1 <= reduction <= width:
            raise WlsupError(f"reduction must be between 1 and the encoder's width {width}, not {reduction}.")
        self.form = choose("ladder form", form, ("residual", "replace"))
        self.layers = sorted(set(range(depth) if layers is None else layers))
        if not self.layers or self.layers[0] < 0 or self.layers[-1] >= depth:
            raise WlsupError(f"layers must be positions of blocks, 0 to {depth - 1}, at least one; not {layers}.")
        side = width // reduction
        heads = max(1, side // 32)
        side -= side % heads
        self.embedding = ConditionEmbedding(condition_width, embedding_width)
        self.tell = nn.Linear(embedding_width, side, bias=False)
        self.enter = nn.Linear(width, side)
        self.down = nn.ModuleList(nn.Linear(width, side) for _ in self.layers)
        self.mix = nn.Parameter(torch.zeros(len(self.layers)))
        self.side = nn.ModuleList(Block(side, heads, qkv_bias=True) for _ in self.layers)
        self.norm = nn.LayerNorm(side)
        self.up = nn.Linear(side, width)
        if form == "residual":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        self.scale = nn.Parameter(torch.ones(())) if form == "residual" else None

    def sites(self, encoder: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor, ConditionSlot], Tensor]]]:
        """Yield where the embedded patches leave, each block that has a rung, and the final norm."""
        yield encoder.backbone.norm_pre, self._begin
        for rung, layer in enumerate(self.layers):
            yield encoder.blocks[layer], self._climb(rung)
        yield encoder.backbone.norm, self._end

    def _begin(self, x: Tensor, slot: ConditionSlot) -> Tensor:
        """(B, L, D): starts the side network, returns the same."""
        slot.keep(self, self.enter(x.detach()) + self.tell(slot.embedded(self.embedding))[:, None])
        return x

    def _climb(self, rung: int) -> Callable[[Tensor, ConditionSlot], Tensor]:
        def climb(x: Tensor, slot: ConditionSlot) -> Tensor:
            """(B, L, D): one step of the side network, returns the same."""
            state, seen = slot.kept(self), x.detach()
            if torch.is_grad_enabled():
                state = checkpoint(self._step, rung, state, seen, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self._step(rung, state, seen)
            slot.keep(self, state)
            return x

        return climb

    def _step(self, rung: int, state: Tensor, seen: Tensor) -> Tensor:
        """(B, L, side) and (B, L, D) -> (B, L, side)."""
        mu = torch.sigmoid(self.mix[rung] / TEMPERATURE)
        return self.side[rung](mu * state + (1 - mu) * self.down[rung](seen))

    def _end(self, x: Tensor, slot: ConditionSlot) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        risen = self.up(self.norm(slot.kept(self)))
        return risen if self.scale is None else x + self.scale * risen
