"""Merged attention: both streams' tokens in one sequence, which attends to itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wlsup.fusion.attention import Attention, FeedForward, Gate
from wlsup.fusion.base import Fusion, FusionLayer, FusionSpec

__all__ = ["MergedFusion", "MergedLayer"]


class MergedLayer(FusionLayer):
    """``z <- z + Attention(z, z)`` over ``z = [image; text]``: one softmax over both streams' keys, shared weights.

    Source: Hendricks et al. 2021, "Decoupling the Role of Data, Attention, and Losses in Multimodal Transformers",
    section 3 (merged attention); single-stream encoders as UNITER (Chen et al. 2020). Pre-norm, and gated where it
    changes the image stream.

    Args:
        width: D.
        spec: widths and heads.
        updates_text: whether the text tokens ask as well.
    """

    def __init__(self, width: int, spec: FusionSpec, updates_text: bool = True) -> None:
        super().__init__(width, spec, updates_text)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, spec.width, spec.heads)
        self.feed = FeedForward(width, spec.hidden)
        self.gate, self.feed_gate = Gate(), Gate()

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor, pattern: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            image: (B, L, D).
            text: (B, M, D).
            mask: (B, M) bool, False at padding.
            pattern: (L + M, L + M) bool, who may look at whom (`attention_pattern`); None: everyone at everyone.

        Returns:
            Both streams.
        """
        length = image.shape[1]
        asking = self.norm(torch.cat([image, text], dim=1))
        allowed = torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=1)[:, None]
        if pattern is not None:
            allowed = allowed & pattern.to(mask.device)
        if not self.updates_text:
            allowed = allowed[:, :length]
        change = self.attention(asking if self.updates_text else asking[:, :length], asking, allowed)
        image = image + self.gate(change[:, :length])
        image = image + self.feed_gate(self.feed(image))
        if self.updates_text:
            text = text + change[:, length:]
            text = text + self.feed(text)
        return image, text


class MergedFusion(Fusion):
    """`MergedLayer`s behind an encoder's blocks."""

    name = "merged_attention"
    kinds = {"merged": MergedLayer}
