"""What every fusion strategy is: an encoder's tokens and a caption's, changed in turn by layers between the blocks.

The image stream is the pretrained encoder itself, with fusion layers hooked in behind some of its blocks; each of a
layer's changes to it passes a gate that is 0 at step 0, so that the encoder begins as the pretrained one. The text
stream begins at the frozen text encoder's tokens and runs through the fusion layers only, which are its own text
layers: it is not gated. It holds the adapter contract (`wlsup.adapters.base`): under the null condition the place of
the caption is taken by a few learned tokens, which pass the same layers as captions do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from wlsup.adapters.base import Adapter
from wlsup.batch import Condition, ConditionSlot
from wlsup.errors import WlsupError, choose

__all__ = ["Fusion", "FusionLayer", "FusionSpec", "TextStream"]


@dataclass(frozen=True)
class FusionSpec:
    """Which fusion, where, and how wide.

    Args:
        kind: "merged": one attention over both streams' tokens together. "co": each stream attends only to the other
            (ViLBERT). "co_meter": each attends to itself, then to the other (METER). "asymmetric_image": only the image
            attends to the text. "asymmetric_text": only the text attends to the image.
        every: a fusion layer behind each ``every``-th block of the encoder.
        width: channels of all attention heads together.
        heads: attention heads.
        hidden: channels of the feed-forwards' hidden layers.
        null_tokens: number of learned tokens that stand where the caption would, under the null condition.
    """

    kind: Literal["merged", "co", "co_meter", "asymmetric_image", "asymmetric_text"] = "merged"
    every: int = 2
    width: int = 64
    heads: int = 4
    hidden: int = 128
    null_tokens: int = 4

    def __post_init__(self) -> None:
        for name in ("every", "width", "heads", "hidden", "null_tokens"):
            if getattr(self, name) < 1:
                raise WlsupError(f"fusion.{name} must be at least 1, not {getattr(self, name)}.")
        if self.width % self.heads:
            raise WlsupError(f"fusion.width {self.width} is not a multiple of fusion.heads {self.heads}.")


class FusionLayer(nn.Module):
    """One step of both streams, each computed from the other's state before the step.

    Args:
        width: D of both streams.
        spec: widths and heads.
        updates_text: whether the text stream is read after this layer; if not, it is left as it came, and the layer has
            no parameters for it.
    """

    def __init__(self, width: int, spec: FusionSpec, updates_text: bool = True) -> None:
        super().__init__()
        self.updates_text = updates_text

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, M, D) and (B, M) bool, False at padding -> both streams after the step."""
        raise TypeError(f"{type(self).__name__} does not say who attends to whom: define forward().")


class TextStream(nn.Module):
    """The text stream's start: caption tokens, layer-normalised, in the encoder's width; or the learned null tokens.

    The null tokens are drawn at the scale of the normalised caption tokens, and share every later weight with them.
    The projection's bias is what tells a text token from an image token.

    Args:
        condition_width: C, channels of the caption tokens.
        width: D.
        null_tokens: their number; 0 where no condition is ever absent.
    """

    def __init__(self, condition_width: int, width: int, null_tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(condition_width, elementwise_affine=False)
        self.null = nn.Parameter(torch.randn(null_tokens, condition_width)) if null_tokens else None
        self.project = nn.Linear(condition_width, width)

    def forward(self, condition: Condition | None, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return (B, M, D) tokens and (B, M) bool, False at padding; M is at least the number of null tokens."""
        if self.null is None:
            if condition is None:
                raise WlsupError("This text stream has no null tokens: give it captions.")
            return self.project(self.norm(condition.tokens)), condition.mask
        count = len(self.null)
        if condition is None:
            null_mask = torch.ones(batch_size, count, dtype=torch.bool, device=self.null.device)
            return self.project(self.null).expand(batch_size, -1, -1), null_mask
        tokens, mask, present = self.norm(condition.tokens), condition.mask, condition.present[:, None]
        short = max(0, count - mask.shape[1])
        tokens, mask = nn.functional.pad(tokens, (0, 0, 0, short)), nn.functional.pad(mask, (0, short))
        null = nn.functional.pad(self.null, (0, 0, 0, mask.shape[1] - count))
        null_mask = torch.arange(mask.shape[1], device=mask.device) < count
        return self.project(torch.where(present[..., None], tokens, null)), torch.where(present, mask, null_mask)


class Fusion(Adapter):
    """A stack of fusion layers behind an encoder's blocks.

    Args:
        width: D, channels of the encoder's tokens.
        depth: number of the encoder's blocks.
        condition_width: C, channels of the caption tokens.
        spec: see `FusionSpec`.

    Raises:
        WlsupError: a kind that is not of this strategy, or an encoder of fewer blocks than ``spec.every``.
    """

    kinds: ClassVar[dict[str, type[FusionLayer]]]

    def __init__(self, width: int, depth: int, condition_width: int, spec: FusionSpec) -> None:
        super().__init__(width, depth, condition_width)
        layer = self.kinds[choose(f"fusion.kind of {self.name}", spec.kind, self.kinds)]
        if spec.every > depth:
            raise WlsupError(
                f"fusion.every is {spec.every}, but the encoder has {depth} blocks: there would be no layer."
            )
        self.spec = spec
        self.places = list(range(spec.every - 1, depth, spec.every))
        self.text = TextStream(condition_width, width, spec.null_tokens if self.image_sees_text else 0)
        last = self.places[-1]
        self.layers = nn.ModuleList(
            layer(width, spec, updates_text=not self.image_sees_text or place != last) for place in self.places
        )

    @property
    def image_sees_text(self) -> bool:
        """Whether captions reach the image stream; if not, the encoder computes the same under every condition."""
        return True

    def sites(self, encoder: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor, ConditionSlot], Tensor]]]:
        """Yield the blocks that a fusion layer follows, in order, with that layer."""
        for place, layer in zip(self.places, self.layers, strict=True):
            yield encoder.blocks[place], self._step(layer)

    def _step(self, layer: FusionLayer) -> Callable[[Tensor, ConditionSlot], Tensor]:
        def step(image: Tensor, slot: ConditionSlot) -> Tensor:
            """(B, L, D) -> (B, L, D)."""
            text, mask = slot.kept(self) or self.text(slot.value, image.shape[0])
            image, text = layer(image, text, mask)
            slot.keep(self, (text, mask))
            return image

        return step
