"""The parts that fusion layers are made of: attention between streams, a feed-forward, a gate, and who looks at whom.

Shapes: B samples, L image tokens, M text tokens, D width, Q queries, K keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.errors import WlsupError, choose

__all__ = ["PATTERNS", "Attention", "FeedForward", "Gate", "attention_pattern"]

# For each strategy which blocks of the joint attention matrix are on: image to image, image to text, text to image,
# text to text (the query first).
PATTERNS: dict[str, tuple[bool, bool, bool, bool]] = {
    "merged": (True, True, True, True),
    "co": (False, True, True, False),
    "asymmetric_image": (False, True, False, False),
    "asymmetric_text": (False, False, True, False),
}


def attention_pattern(kind: str, image_length: int, text_length: int) -> Tensor:
    """Return the mask under which one merged attention computes another strategy.

    Source: Bugliarello et al. 2021, "Multimodal Pretraining Unmasked", section 3: single- and dual-stream encoders as
    one attention whose inter- and intra-modal blocks are switched on and off.

    Args:
        kind: "merged", "co", "asymmetric_image" or "asymmetric_text".
        image_length: L.
        text_length: M.

    Returns:
        (L + M, L + M) bool, True where the row's query may look at the column's key; image tokens come first.

    Raises:
        WlsupError: an unknown kind.
    """
    on = PATTERNS[choose("attention pattern", kind, PATTERNS)]
    pattern = torch.zeros(image_length + text_length, image_length + text_length, dtype=torch.bool)
    image, text = slice(0, image_length), slice(image_length, None)
    for allowed, rows, columns in zip(on, (image, image, text, text), (image, text, image, text), strict=True):
        pattern[rows, columns] = allowed
    return pattern


class Attention(nn.Module):
    """Multi-head attention whose queries and keys may come from different streams.

    Source: Vaswani et al. 2017, section 3.2. The output projection has no bias, so that a query with nothing to look at
    gets exactly 0.

    Args:
        width: D.
        inner: channels of all heads together.
        heads: number of heads.

    Raises:
        WlsupError: ``inner`` is not a multiple of ``heads``.
    """

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or inner < 1 or inner % heads:
            raise WlsupError(
                f"Attention over {inner} channels cannot be split into {heads} heads: the width must be a multiple of "
                "the number of heads, both at least 1."
            )
        self.heads = heads
        self.query = nn.Linear(width, inner)
        self.key_value = nn.Linear(width, 2 * inner)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, queries: Tensor, keys: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Let each query look at the keys.

        Args:
            queries: (B, Q, D).
            keys: (B, K, D); values are made from them too.
            allowed: (B or 1, Q or 1, K) bool, False where a query may not look; None: everywhere.

        Returns:
            (B, Q, D), exactly 0 for a query that may look nowhere.
        """
        query, key, value = (self._split(x) for x in (self.query(queries), *self.key_value(keys).chunk(2, dim=-1)))
        if allowed is None:
            return self._join(F.scaled_dot_product_attention(query, key, value))
        # A row without any key would be a softmax over nothing: let it look anywhere, and drop what it saw.
        looks = allowed.any(dim=-1, keepdim=True)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=(allowed | ~looks)[:, None])
        return self._join(attended) * looks

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, inner) -> (B, heads, T, inner / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        """(B, heads, T, inner / heads) -> (B, T, D)."""
        return self.out(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``W2 gelu(W1 LN(x))``: what each stream does with what it has seen; the caller adds it to x.

    Args:
        width: D.
        hidden: channels of the hidden layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down(F.gelu(self.up(self.norm(x))))


class Gate(nn.Module):
    """``tanh(g) x`` with g = 0 at step 0, when whatever it guards changes nothing and yet g has a gradient.

    Source: Alayrac et al. 2022 (Flamingo), section 3.1.2. What it guards must not start at zero as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.g.tanh() * x
