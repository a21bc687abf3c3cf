"""Co-attention, in its two readings: each stream asks only the other; each asks itself and then the other."""

from __future__ import annotations

from torch import Tensor, nn

from wlsup.fusion.attention import Attention, FeedForward, Gate
from wlsup.fusion.base import Fusion, FusionLayer, FusionSpec

__all__ = ["CoFusion", "CoLayer", "MeterLayer"]


class CoLayer(FusionLayer):
    """Each stream attends only to the other: ``x <- x + A(x, y)`` and ``y <- y + A'(y, x)``, both from the old states.

    Source: Lu et al. 2019 (ViLBERT), section 2.2, the co-attentional layer; Hendricks et al. 2021, section 3. Pre-norm,
    and gated where it changes the image stream, whose own self-attention is that of the encoder's blocks.

    Args:
        width: D.
        spec: widths and heads.
        updates_text: whether the text stream asks as well.
    """

    def __init__(self, width: int, spec: FusionSpec, updates_text: bool = True) -> None:
        super().__init__(width, spec, updates_text)
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_attention = Attention(width, spec.width, spec.heads)
        self.image_feed = FeedForward(width, spec.hidden)
        self.gate, self.feed_gate = Gate(), Gate()
        if updates_text:
            self.text_attention = Attention(width, spec.width, spec.heads)
            self.text_feed = FeedForward(width, spec.hidden)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, M, D) and (B, M) bool, False at padding -> both streams."""
        old_image, old_text = self.image_norm(image), self.text_norm(text)
        image = image + self.gate(self.image_attention(old_image, old_text, mask[:, None]))
        image = image + self.feed_gate(self.image_feed(image))
        if self.updates_text:
            text = text + self.text_attention(old_text, old_image)
            text = text + self.text_feed(text)
        return image, text


class MeterLayer(FusionLayer):
    """Each stream attends to itself, then to the other, then feeds forward; both from the other's old state.

    Source: Dou et al. 2022 (METER), section 3.1, figure 2: co-attention. The updates are simultaneous: the text asks
    the image tokens as they entered the layer, not as the layer left them. Theirs is post-norm, as in BERT; ours is
    pre-norm, as the encoder's blocks are, and gated where it changes the image stream.

    Args:
        width: D.
        spec: widths and heads.
        updates_text: whether the text stream asks as well.
    """

    def __init__(self, width: int, spec: FusionSpec, updates_text: bool = True) -> None:
        super().__init__(width, spec, updates_text)

        def attention() -> Attention:
            return Attention(width, spec.width, spec.heads)

        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_self, self.image_cross, self.image_cross_norm = attention(), attention(), nn.LayerNorm(width)
        self.image_feed = FeedForward(width, spec.hidden)
        self.self_gate, self.cross_gate, self.feed_gate = Gate(), Gate(), Gate()
        if updates_text:
            self.text_self, self.text_cross, self.text_cross_norm = attention(), attention(), nn.LayerNorm(width)
            self.text_feed = FeedForward(width, spec.hidden)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, M, D) and (B, M) bool, False at padding -> both streams."""
        old_image, old_text, allowed = self.image_norm(image), self.text_norm(text), mask[:, None]
        image = image + self.self_gate(self.image_self(old_image, old_image))
        image = image + self.cross_gate(self.image_cross(self.image_cross_norm(image), old_text, allowed))
        image = image + self.feed_gate(self.image_feed(image))
        if self.updates_text:
            text = text + self.text_self(old_text, old_text, allowed)
            text = text + self.text_cross(self.text_cross_norm(text), old_image)
            text = text + self.text_feed(text)
        return image, text


class CoFusion(Fusion):
    """`CoLayer`s or `MeterLayer`s behind an encoder's blocks."""

    name = "co_attention"
    kinds = {"co": CoLayer, "co_meter": MeterLayer}
