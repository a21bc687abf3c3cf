"""Asymmetric attention: one stream asks the other, which never asks back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from wlsup.batch import Condition, ConditionSlot
from wlsup.errors import WlsupError
from wlsup.fusion.attention import Attention, FeedForward, Gate
from wlsup.fusion.base import Fusion, FusionLayer, FusionSpec

__all__ = ["AsymmetricFusion", "ImageAsksLayer", "TextAsksLayer"]


class ImageAsksLayer(FusionLayer):
    """The image attends to the text: ``x <- x + A(x, y)``; the text stream only feeds forward.

    Source: Hendricks et al. 2021, section 3 (asymmetric attention, image query); with the gate it is Flamingo's layer
    (Alayrac et al. 2022, section 3.1.2) with the modalities exchanged.

    Args:
        width: D.
        spec: widths and heads.
        updates_text: whether the text stream feeds forward.
    """

    def __init__(self, width: int, spec: FusionSpec, updates_text: bool = True) -> None:
        super().__init__(width, spec, updates_text)
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_attention = Attention(width, spec.width, spec.heads)
        self.image_feed = FeedForward(width, spec.hidden)
        self.gate, self.feed_gate = Gate(), Gate()
        if updates_text:
            self.text_feed = FeedForward(width, spec.hidden)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, M, D) and (B, M) bool, False at padding -> both streams; the text saw no image."""
        change = self.image_attention(self.image_norm(image), self.text_norm(text), mask[:, None])
        image = image + self.gate(change)
        image = image + self.feed_gate(self.image_feed(image))
        return image, text + self.text_feed(text) if self.updates_text else text


class TextAsksLayer(FusionLayer):
    """The text attends to the image: ``y <- y + A(y, x)``; the image stream only feeds forward, gated.

    Source: Hendricks et al. 2021, section 3 (asymmetric attention, language query); ALBEF's and BLIP's multimodal
    encoders (Li et al. 2021, 2022) look in this direction. Image and text steps can be taken apart, since the first
    never needs the second.

    Args:
        width: D.
        spec: widths and heads.
        updates_text: must be True: the text stream is the only one that sees anything.
    """

    def __init__(self, width: int, spec: FusionSpec, updates_text: bool = True) -> None:
        super().__init__(width, spec, updates_text)
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.text_attention = Attention(width, spec.width, spec.heads)
        self.text_feed = FeedForward(width, spec.hidden)
        self.image_feed, self.feed_gate = FeedForward(width, spec.hidden), Gate()

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, M, D) and (B, M) bool -> both streams; the image saw no text."""
        return self.step_image(image), self.step_text(image, text)

    def step_image(self, image: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return image + self.feed_gate(self.image_feed(image))

    def step_text(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, L, D) as they entered the layer, and (B, M, D) -> (B, M, D).

        Text tokens do not look at one another here, so padding, and other captions in the same row, change nothing.
        """
        text = text + self.text_attention(self.text_norm(text), self.image_norm(image))
        return text + self.text_feed(text)


class AsymmetricFusion(Fusion):
    """`ImageAsksLayer`s or `TextAsksLayer`s behind an encoder's blocks.

    With "asymmetric_text" no caption ever reaches the encoder: hooked in are only the gated feed-forwards of the image
    stream, the same under every condition. The text stream is then run apart, by `score`, over the image tokens that
    `recording` collected; it is there that language reaches the encoder: in the gradient.
    """

    name = "asymmetric_attention"
    kinds = {"asymmetric_image": ImageAsksLayer, "asymmetric_text": TextAsksLayer}

    def __init__(self, width: int, depth: int, condition_width: int, spec: FusionSpec) -> None:
        super().__init__(width, depth, condition_width, spec)
        self._records: list[list[Tensor]] | None = None
        if not self.image_sees_text:
            self.score_norm, self.score_head = nn.LayerNorm(width), nn.Linear(width, 1)

    @property
    def image_sees_text(self) -> bool:
        """Whether captions reach the image stream."""
        return self.spec.kind == "asymmetric_image"

    @contextmanager
    def recording(self) -> Iterator[list[list[Tensor]]]:
        """Collect, of each pass of the encoder meanwhile, the (B, L, D) image tokens that enter each fusion layer."""
        self._records = []
        try:
            yield self._records
        finally:
            self._records = None

    def score(self, image: Sequence[Tensor], captions: Condition) -> Tensor:
        """Say how well captions fit pictures, by text tokens that have looked at the picture's.

        Args:
            image: for each fusion layer the (B, L, D) tokens that entered it, as `recording` collects them.
            captions: R * B captions, caption ``r * B + i`` to be held against picture i.

        Returns:
            (B, R) scores.

        Raises:
            WlsupError: the number of captions is not a multiple of that of pictures.
        """
        batch, given = len(image[0]), len(captions.mask)
        if given % batch:
            raise WlsupError(f"{given} captions cannot be shared out among {batch} pictures.")
        tokens, mask = self.text(captions, given)
        # Text tokens never look at one another, so all captions of a picture go in one row of queries.
        rows, length = given // batch, mask.shape[1]
        text = tokens.unflatten(0, (rows, batch)).transpose(0, 1).flatten(1, 2)  # (B, R * M, D)
        for layer, seen in zip(self.layers, image, strict=True):
            text = layer.step_text(seen, text)
        weight = mask.unflatten(0, (rows, batch)).transpose(0, 1)[..., None].to(text.dtype)  # (B, R, M, 1)
        pooled = (text.unflatten(1, (rows, length)) * weight).sum(2) / weight.sum(2).clamp(min=1)
        return self.score_head(self.score_norm(pooled)).squeeze(-1)

    def _step(self, layer: FusionLayer) -> Callable[[Tensor, ConditionSlot], Tensor]:
        if self.image_sees_text:
            return super()._step(layer)
        first = layer is self.layers[0]

        def step(image: Tensor, slot: ConditionSlot) -> Tensor:
            """(B, L, D) -> (B, L, D)."""
            if self._records is not None:
                if first:
                    self._records.append([])
                self._records[-1].append(image)
            return layer.step_image(image)

        return step
