"""A small captioner of its own: a transformer that reads the encoder's tokens by cross-attention (CapPa's decoder).

Shapes: B samples, T caption positions, L picture tokens, D encoder width, W decoder width, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.errors import WlsupError

__all__ = ["CaptionDecoder", "CaptionDecoderSpec"]


@dataclass(frozen=True)
class CaptionDecoderSpec:
    """The decoder's shape; CapPa's for ViT-B/16 has width 768, depth 6 and 12 heads.

    Args:
        width: W, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs over W.

    Raises:
        WlsupError: a shape that cannot be.
    """

    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads or not self.mlp_ratio > 0:
            raise WlsupError(
                f"A caption decoder of width {self.width}, depth {self.depth}, {self.heads} heads and mlp_ratio "
                f"{self.mlp_ratio} cannot be: all must be positive, and the width a multiple of the heads."
            )


class CaptionDecoder(nn.Module):
    """Predict a caption's tokens from what the encoder saw, word after word or all at once.

    Which of the two is the caller's choice of inputs and attention (`wlsup.objectives.captioning.parallel_inputs`,
    `parallel_attention`); the weights are the same.

    Source: Tschannen et al. 2023, "Image Captioners Are Scalable Vision Learners Too", section 3: a decoder with
    cross-attention to the encoder's tokens, no biases, and output weights that begin at zero (the first loss is ln V).

    Args:
        image_width: D.
        vocabulary: V; the embedding has two rows more, for `mask_id` and `start_id`.
        max_length: T at most.
        spec: its shape.
    """

    def __init__(self, image_width: int, vocabulary: int, max_length: int, spec: CaptionDecoderSpec) -> None:
        super().__init__()
        self.mask_id, self.start_id, self.max_length = vocabulary, vocabulary + 1, max_length
        self.embed = nn.Embedding(vocabulary + 2, spec.width)
        self.pos_embed = nn.Parameter(torch.empty(max_length, spec.width))
        self.blocks = nn.ModuleList(_Block(image_width, spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width, bias=False)
        self.predict = nn.Linear(spec.width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.zeros_(self.predict.weight)

    def forward(self, inputs: Tensor, attention: Tensor, memory: Tensor) -> Tensor:
        """Return the logits of the token at each position.

        Args:
            inputs: (B, T) token ids, `mask_id` or `start_id`.
            attention: (B, T, T) bool, True where the position of the row may look at that of the column.
            memory: (B, L, D) the encoder's tokens.

        Returns:
            (B, T, V), of the token *at* the position: targets are not shifted.

        Raises:
            WlsupError: more positions than the decoder has.
        """
        if inputs.shape[1] > self.max_length:
            raise WlsupError(f"{inputs.shape[1]} tokens do not fit a caption decoder of {self.max_length} positions.")
        tokens = self.embed(inputs) + self.pos_embed[: inputs.shape[1]]
        for block in self.blocks:
            tokens = block(tokens, attention[:, None], memory)
        return self.predict(self.norm(tokens))

    @torch.no_grad()
    def generate(self, memory: Tensor, end_id: int, parallel: bool = False) -> Tensor:
        """Return the likeliest tokens, (B, T) with T up to `max_length`; those after an end token mean nothing.

        Args:
            memory: (B, L, D) the encoder's tokens.
            end_id: when every caption has it, word-after-word decoding stops.
            parallel: all positions at once, from mask tokens; else word after word.
        """
        batch, device = len(memory), memory.device
        if parallel:
            inputs = torch.full((batch, self.max_length), self.mask_id, device=device)
            return self(inputs, torch.ones(1, *[self.max_length] * 2, dtype=torch.bool, device=device), memory).argmax(
                -1
            )
        inputs = torch.full((batch, 1), self.start_id, device=device)
        for length in range(1, self.max_length + 1):
            causal = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
            following = self(inputs, causal, memory)[:, -1:].argmax(-1)
            inputs = torch.cat([inputs, following], dim=1)
            if (inputs == end_id).any(dim=1).all():
                break
        return inputs[:, 1:]


class _Block(nn.Module):
    """Self-attention, cross-attention to the picture, MLP; each normalised before and added."""

    def __init__(self, image_width: int, spec: CaptionDecoderSpec) -> None:
        super().__init__()
        width, hidden = spec.width, round(spec.width * spec.mlp_ratio)
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(3))
        self.self_attention = _Attention(width, width, spec.heads)
        self.cross_attention = _Attention(width, image_width, spec.heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))

    def forward(self, tokens: Tensor, attention: Tensor, memory: Tensor) -> Tensor:
        """(B, T, W), (B, 1, T, T), (B, L, D) -> (B, T, W)."""
        normed = self.norms[0](tokens)
        tokens = tokens + self.self_attention(normed, normed, attention)
        tokens = tokens + self.cross_attention(self.norms[1](tokens), memory, None)
        return tokens + self.mlp(self.norms[2](tokens))


class _Attention(nn.Module):
    """Multi-head attention without biases, keys and values from a source of any width."""

    def __init__(self, width: int, source_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(source_width, width, bias=False)
        self.value = nn.Linear(source_width, width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, source: Tensor, attention: Tensor | None) -> Tensor:
        """(B, T, W), (B, S, D), bool (B, 1, T, S) or None -> (B, T, W)."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(tokens), self.key(source), self.value(source))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention)
        return self.project(attended.transpose(1, 2).flatten(2))
