"""Token replay: a few tokens, computed once, that every adapted block may look at again. Ours, not published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.adapters.base import Adapter, register
from wlsup.batch import ConditionSlot
from wlsup.errors import WlsupError, choose

__all__ = ["ReplaySite", "TokenReader", "TokenReplay"]

_KINDS = ("layerwise", "concat")
_SOURCES = ("caption", "image", "both")
_GATES = ("tanh", "zero_up")


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """Multi-head attention without projections.

    Args:
        query: (B, Q, r).
        key: (B, K, r).
        value: (B, K, r).
        heads: number of heads, a divisor of r.
        allowed: (B, K) bool, False at keys not to be looked at; None: all.

    Returns:
        (B, Q, r).
    """
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = None if allowed is None else allowed[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class TokenReader(nn.Module):
    """A source's tokens made into tokens to replay: all of them, or ``count`` read from them by learned queries.

    The learned queries are those of Flamingo's resampler (Alayrac et al. 2022, section 3.1.1), in one step. Either way
    the order of the source's tokens does not matter. Replayed tokens are layer-normalised: the null token, drawn from a
    unit normal, begins at their scale. The norm's bias tells one source from another.

    Args:
        source_width: channels of the source's tokens.
        hidden: r, channels of the replayed tokens.
        heads: attention heads of the reading.
        count: number of replayed tokens; None: as many as the source has.
    """

    def __init__(self, source_width: int, hidden: int, heads: int, count: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(source_width, elementwise_affine=False)
        self.project = nn.Linear(source_width, hidden)
        self.queries = None if count is None else nn.Parameter(torch.randn(count, hidden))
        self.norm_replayed = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, S, source_width) and (B, S) bool, False at padding -> (B, m, r) and (B, m) bool, False at padding."""
        replayed = self.project(self.norm(tokens))
        if mask is None:
            mask = torch.ones(replayed.shape[:2], dtype=torch.bool, device=replayed.device)
        if self.queries is None:
            return self.norm_replayed(replayed), mask
        # A caption without any token is read as padding, which the caller then sees to be absent.
        some = mask.any(dim=1, keepdim=True)
        queries = self.queries.expand(replayed.shape[0], -1, -1)
        read = attend(queries, replayed, replayed, self.heads, mask | ~some)
        return self.norm_replayed(read), some.expand(-1, read.shape[1])


class ReplaySite(nn.Module):
    """One adapted block: ``x <- x + gate(W_up A(W_down LN(x), keys))`` with keys from the replayed tokens.

    Args:
        width: D.
        hidden: r, channels of the bottleneck.
        heads: attention heads, a divisor of r.
        kind: "layerwise": keys are the replayed tokens. "concat": keys are the block's own tokens as well.
        gate: "tanh": a scalar ``tanh(g)``, g = 0, over an ordinary up-projection. "zero_up": no gate, and the
            up-projection zero. Never both: that is a saddle, at which neither has a gradient.
    """

    def __init__(self, width: int, hidden: int, heads: int, kind: str, gate: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.kaiming_normal_(self.up.weight, nonlinearity="linear")
        nn.init.zeros_(self.up.bias)
        self.g = nn.Parameter(torch.zeros(1)) if gate == "tanh" else None
        if self.g is None:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, replayed: Tensor, allowed: Tensor, key_value: nn.Linear) -> Tensor:
        """Let a block's tokens look at the replayed ones.

        Args:
            x: (B, L, D).
            replayed: (B, m, r), the null token among them.
            allowed: (B, m) bool, False at padding and at absent captions.
            key_value: r -> 2r, this site's own or shared by all.

        Returns:
            (B, L, D).
        """
        query = self.down(self.norm(x))
        if self.kind == "concat":
            replayed = torch.cat([query, replayed], dim=1)
            allowed = torch.cat([allowed.new_ones(query.shape[:2]), allowed], dim=1)
        key, value = key_value(replayed).chunk(2, dim=-1)
        change = self.up(attend(query, key, value, self.heads, allowed))
        return x + (change if self.g is None else self.g.tanh() * change)


@register("token_replay")
class TokenReplay(Adapter):
    """Tokens computed once in a forward pass and replayed at every adapted block, whose tokens attend to them.

    Source: ours. "Token replay" carries a name without a published definition; these are our readings of it.
    "layerwise" (the default): the block's tokens ask the replayed ones through a bottleneck. "concat": block and
    replayed tokens attend to themselves together through the bottleneck, and the block's part is kept. The third
    reading, replaying pictures that were seen before pretraining's end against forgetting, is a loss and not an
    adapter: the regularizer ``replay``, which goes with every approach. Gate after Flamingo (Alayrac et al. 2022).

    What is replayed is not changed by the blocks. A learned null token stands beside it at every site: a query may
    ignore the replay, and under the null condition it is what is left of the caption. Image tokens are replayed under
    the null condition too, so that the evaluated encoder has more than one constant to look at ("both", the default).

    Args:
        width: D, channels of the encoder's tokens.
        depth: number of the encoder's blocks.
        condition_width: C, channels of the caption tokens.
        kind: "layerwise" or "concat".
        source: "caption", "image" (the picture's own patch tokens as block ``image_block`` left them) or "both".
        tokens: m, number of tokens replayed from each source; None: all the source has.
        hidden: r, channels of the bottleneck.
        heads: attention heads, a divisor of ``hidden``.
        layers: indices of the adapted blocks; None: all, or with image tokens all after ``image_block``.
        image_block: index of the block whose patch tokens are stored.
        share_projection: one projection of replayed tokens to keys and values for all blocks.
        gate: "tanh" or "zero_up", see `ReplaySite`.

    Raises:
        WlsupError: an unknown choice, heads that do not divide ``hidden``, or blocks that are not there or come before
            the image tokens are stored.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        condition_width: int,
        kind: Literal["layerwise", "concat"] = "layerwise",
        source: Literal["caption", "image", "both"] = "both",
        tokens: int | None = 8,
        hidden: int = 32,
        heads: int = 4,
        layers: Sequence[int] | None = None,
        image_block: int = 0,
        share_projection: bool = False,
        gate: Literal["tanh", "zero_up"] = "tanh",
    ) -> None:
        super().__init__(width, depth, condition_width)
        choose("kind of token replay", kind, _KINDS)
        choose("source of token replay", source, _SOURCES)
        choose("gate of token replay", gate, _GATES)
        if hidden < 1 or heads < 1 or hidden % heads:
            raise WlsupError(f"hidden {hidden} must be a multiple of heads {heads}, both at least 1.")
        if tokens is not None and tokens < 1:
            raise WlsupError(f"The number of replayed tokens must be at least 1, or null for all, not {tokens}.")
        self.image_block = image_block if source != "caption" else None
        self.layers = _adapted_blocks(layers, depth, self.image_block)
        self.caption_reader = TokenReader(condition_width, hidden, heads, tokens) if source != "image" else None
        self.image_reader = TokenReader(width, hidden, heads, tokens) if source != "caption" else None
        self.null = nn.Parameter(torch.randn(1, hidden))
        self.replay_sites = nn.ModuleList(ReplaySite(width, hidden, heads, kind, gate) for _ in self.layers)
        self.key_values = nn.ModuleList(
            nn.Linear(hidden, 2 * hidden) for _ in (self.layers[:1] if share_projection else self.layers)
        )

    def sites(self, encoder: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor, ConditionSlot], Tensor]]]:
        """Yield the block whose tokens are stored, then the adapted blocks in order."""
        if self.image_block is not None:
            yield encoder.blocks[self.image_block], self._store(encoder.num_prefix_tokens)
        for position, (layer, site) in enumerate(zip(self.layers, self.replay_sites, strict=True)):
            yield encoder.blocks[layer], self._replay(site, self.key_values[position % len(self.key_values)])

    def _store(self, prefix: int) -> Callable[[Tensor, ConditionSlot], Tensor]:
        def store(x: Tensor, slot: ConditionSlot) -> Tensor:
            """(B, P + N, D) -> the same."""
            slot.keep(self.image_reader, x[:, prefix:])
            return x

        return store

    def _replay(self, site: ReplaySite, key_value: nn.Linear) -> Callable[[Tensor, ConditionSlot], Tensor]:
        def replay(x: Tensor, slot: ConditionSlot) -> Tensor:
            """(B, L, D) -> (B, L, D)."""
            replayed = slot.kept(self) or self._read(slot, x.shape[0])
            slot.keep(self, replayed)
            return site(x, *replayed, key_value)

        return replay

    def _read(self, slot: ConditionSlot, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return (B, m, r) tokens to replay, the null token first, and (B, m) bool, False where there is nothing."""
        null = self.null.expand(batch_size, 1, -1)
        parts = [(null, torch.ones(batch_size, 1, dtype=torch.bool, device=null.device))]
        if self.image_reader is not None:
            parts.append(self.image_reader(slot.kept(self.image_reader)))
        condition = slot.value
        if self.caption_reader is not None and condition is not None:
            tokens, allowed = self.caption_reader(condition.tokens, condition.mask)
            parts.append((tokens, allowed & condition.present[:, None]))
        return torch.cat([tokens for tokens, _ in parts], dim=1), torch.cat([mask for _, mask in parts], dim=1)


def _adapted_blocks(layers: Sequence[int] | None, depth: int, image_block: int | None) -> list[int]:
    first = 0 if image_block is None else image_block + 1
    if image_block is not None and not 0 <= image_block < depth - 1:
        raise WlsupError(
            f"image_block is {image_block}: image tokens can be stored behind blocks 0 to {depth - 2} of {depth}, so "
            "that a block is left to replay them at."
        )
    chosen = list(range(first, depth)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < first or chosen[-1] >= depth:
        after = f", those after image_block {image_block}" if image_block is not None else ""
        raise WlsupError(f"layers is {list(layers or [])}; allowed: at least one of {first} to {depth - 1}{after}.")
    return chosen
