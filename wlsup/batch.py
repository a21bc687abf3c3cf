"""What travels between the parts of the suite: pictures, captions, conditions, outputs.

Shapes: B samples, N patch tokens, M text tokens, D vision width, C text width, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wlsup.draws import per_sample

__all__ = [
    "CaptionBatch",
    "Condition",
    "ConditionSlot",
    "Domain",
    "EvalSet",
    "FeatureExtractor",
    "ImageBatch",
    "ImageSpec",
    "VisionOutput",
]

Domain = Literal["in", "out"]


@dataclass(frozen=True)
class ImageSpec:
    """How an encoder wants its pictures: the data side reads it, the model side states it.

    Args:
        size: side of the square input, in pixels.
        mean: per-channel mean in [0, 1] subtracted after scaling to [0, 1].
        std: per-channel standard deviation divided by.
        interpolation: "bicubic" or "bilinear".
        resize: length in pixels of the shorter side before the centre crop at evaluation. DINO's own evaluation uses
            256 for a 224 crop, which differs from timm's ``crop_pct`` (248).
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    resize: int = 256


@dataclass
class CaptionBatch:
    """Image-caption pairs.

    Args:
        images: (B, 3, H, W), normalised by the encoder's `ImageSpec`.
        captions: B strings; ``captions[i]`` describes ``images[i]``.
        keys: B stable names of the pairs' images, the same on every machine.
        skipped: "key: reason" of samples that could not be read and were replaced in this batch.
        replay: (R, 3, H, W) unlabelled pictures of the pretrained encoder's own domain, where a regulariser asks for
            them.
        encoded: what a frozen encoder made of the pictures, where that is kept; ``images`` then holds none, (B, 0).
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    skipped: list[str] = field(default_factory=list)
    replay: Tensor | None = None
    encoded: VisionOutput | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CaptionBatch:
        """Return the batch with its images on ``device``."""
        return self._each(lambda images: images.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CaptionBatch:
        """Return the batch with page-locked images (called by DataLoader)."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> CaptionBatch:
        replayed = None if self.replay is None else change(self.replay)
        encoded = self.encoded
        if encoded is not None:
            encoded = replace(encoded, pooled=change(encoded.pooled), tokens=change(encoded.tokens))
        return replace(self, images=change(self.images), replay=replayed, encoded=encoded)


@dataclass
class ImageBatch:
    """Labelled (or, with ``labels`` all -1, unlabelled) pictures.

    Args:
        images: (B, 3, H, W), normalised.
        labels: (B,) int64 class ids, -1 for none.
        indices: (B,) int64 positions in the data set: what evaluation sorts and deduplicates by.
        skipped: "key: reason" of samples that could not be read; their images are zeros and evaluation leaves them out.
        valid: (B,) bool, False where the sample could not be read.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    skipped: list[str] = field(default_factory=list)
    valid: Tensor | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """Return the batch with its images on ``device``; labels and indices stay where they are."""
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageBatch:
        """Return the batch with page-locked images (called by DataLoader)."""
        return replace(self, images=self.images.pin_memory())


@dataclass
class Condition:
    """What a conditioned adapter may look at: encoded captions, each present or not.

    ``None`` in place of a `Condition` is the *null condition* for the whole batch, and ``present[i] = False`` the null
    condition for sample i: each adapter answers it with a learned null embedding.

    Args:
        tokens: (B, M, C) text features, one per token.
        mask: (B, M) bool, True at real tokens, False at padding.
        pooled: (B, C) one feature a caption.
        present: (B,) bool, False where the sample runs under the null condition.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    present: Tensor

    def __getitem__(self, rows: slice) -> Condition:
        """Return the condition of some of the samples."""
        return Condition(self.tokens[rows], self.mask[rows], self.pooled[rows], self.present[rows])

    def drop(self, probability: float, generator: torch.Generator | None = None) -> Condition:
        """Return the condition with each sample's caption dropped with ``probability`` (classifier-free style)."""
        device = self.present.device
        chance = per_sample(
            lambda n, stream: torch.rand(n, generator=stream, device=device), len(self.present), device, generator
        )
        return replace(self, present=self.present & (chance >= probability))


class ConditionSlot:
    """Where an encoder lays the condition of the forward pass under way, and attached adapters find it.

    Adapters are attached by hooks, from outside, so that the pretrained model's code and keys stay as they are; the
    slot is how a hook learns the condition. Outside a forward pass it is empty: the null condition.
    """

    def __init__(self) -> None:
        self.value: Condition | None = None
        self._memo: dict[int, Tensor] | None = None
        self._kept: dict[object, Any] | None = None

    @contextmanager
    def holding(self, condition: Condition | None, kept: dict[object, Any] | None = None) -> Iterator[None]:
        """Hold ``condition`` for one forward pass, or for a part of one that goes on from what was ``kept``."""
        before = self.value, self._memo, self._kept
        self.value, self._memo = condition, {}
        self._kept = dict(kept or {}) if self._kept is None else self._kept
        try:
            yield
        finally:
            self.value, self._memo, self._kept = before

    def keep(self, key: object, value: Any) -> None:
        """Leave ``value`` for later sites of the same forward pass."""
        if self._kept is not None:
            self._kept[key] = value

    def kept(self, key: object = None) -> Any:
        """Return what an earlier site of this forward pass left under ``key``, or None; without a key, all of it."""
        return dict(self._kept or {}) if key is None else (self._kept or {}).get(key)

    def embedded(self, embed: Callable[[Condition | None], Tensor]) -> Tensor:
        """Return ``embed(condition)``, computed once a forward pass however many sites ask for it."""
        if self._memo is None:
            return embed(self.value)
        if id(embed) not in self._memo:
            self._memo[id(embed)] = embed(self.value)
        return self._memo[id(embed)]


@dataclass
class VisionOutput:
    """What a vision encoder returns.

    Args:
        pooled: (B, D) the feature, by the model's own pooling convention.
        tokens: (B, P + N, D) after the final norm, P prefix tokens (CLS, registers) first.
        num_prefix_tokens: P.
    """

    pooled: Tensor
    tokens: Tensor
    num_prefix_tokens: int = 1

    @property
    def patch_tokens(self) -> Tensor:
        """(B, N, D): the tokens without the prefix."""
        return self.tokens[:, self.num_prefix_tokens :]


@runtime_checkable
class FeatureExtractor(Protocol):
    """The one door for k-NN, probe, retrieval, WiSE-FT and export."""

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        ...


@dataclass
class EvalSet:
    """A labelled set to judge an encoder by.

    Args:
        name: as tables and results.json show it.
        domain: "in" or "out", relative to what the encoder was pretrained on.
        train: the bank; item i is an (image, label) pair of a float (3, H, W) tensor and an int.
        test: the queries, likewise.
        class_names: one a class id.
    """

    name: str
    domain: Domain
    train: Dataset
    test: Dataset
    class_names: Sequence[str]
