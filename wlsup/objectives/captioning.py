"""Captioning: what a caption's tokens are worth as labels, behind a prefix in a language model or all at once (CapPa).

Shapes: B samples, P prefix positions, T caption tokens, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wlsup.draws import per_sample
from wlsup.errors import WlsupError, choose
from wlsup.models.caption_decoder import CaptionDecoder
from wlsup.models.caption_tokens import CaptionTokens
from wlsup.models.language import LanguageModel
from wlsup.ranks import mean_over_ranks

__all__ = [
    "IGNORE",
    "CaptioningSpec",
    "caption_labels",
    "captioning_loss",
    "parallel_attention",
    "parallel_captioning_loss",
    "parallel_inputs",
    "prefix_captioning_loss",
]

IGNORE = -100
"""The label that counts nowhere, torch's and transformers' default."""


@dataclass(frozen=True)
class CaptioningSpec:
    """Reconstruction and captioning together: which captioning, how much of each, and what the captioner sees.

    Args:
        captioning: "prefix", through a frozen language model; or "parallel", CapPa's decoder.
        captioning_weight: factor of the captioning loss; 0 leaves the branch out.
        reconstruction_weight: factor of the masked reconstruction loss; 0 leaves the branch out.
        mask_ratio: share of the patches that the reconstruction branch does not see, in [0, 1).
        caption_view: "full" pictures, or "masked", the patches that the reconstruction branch sees: one pass of the
            encoder instead of two.
        parallel_fraction: probability with which a caption is predicted all at once, in [0, 1]; with "parallel".

    Raises:
        WlsupError: a value out of its range, or an option that the captioning does not read.
    """

    captioning: Literal["prefix", "parallel"] = "prefix"
    captioning_weight: float = 1.0
    reconstruction_weight: float = 1.0
    mask_ratio: float = 0.75
    caption_view: Literal["full", "masked"] = "full"
    parallel_fraction: float = 0.75

    def __post_init__(self) -> None:
        choose("captioning", self.captioning, ("prefix", "parallel"))
        choose("caption_view", self.caption_view, ("full", "masked"))
        if not 0 <= self.mask_ratio < 1:
            raise WlsupError(f"mask_ratio must be in [0, 1), not {self.mask_ratio}.")
        if not 0 <= self.parallel_fraction <= 1:
            raise WlsupError(f"parallel_fraction must be in [0, 1], not {self.parallel_fraction}.")
        if self.captioning == "prefix" and self.parallel_fraction != CaptioningSpec.parallel_fraction:
            raise WlsupError("objective.parallel_fraction is of captioning: parallel: set that, or leave it out.")
        if min(self.captioning_weight, self.reconstruction_weight) < 0 or not (
            self.captioning_weight or self.reconstruction_weight
        ):
            raise WlsupError("captioning_weight and reconstruction_weight must be >= 0, and not both 0.")


def caption_labels(ids: Tensor, end_id: int, prefix_length: int = 0) -> Tensor:
    """Return the labels of a prefix followed by captions, aligned with the inputs: whoever uses them shifts, once.

    The first end token of each caption is a label, what comes after it is not. With a tokenizer that pads by its end
    token (GPT-2's) that is the first pad: were it masked like the others, the captioner would never learn to stop.

    Source: Eichenberg et al. 2022 (MAGMA), whose labels are built so.

    Args:
        ids: (B, T), padded on the right by anything.
        end_id: the end token.
        prefix_length: P positions in front, which have no label.

    Returns:
        (B, P + T), `IGNORE` where nothing is to be predicted.
    """
    ended = (ids == end_id).cumsum(dim=1)
    after = F.pad(ended, (1, -1)).bool()  # an end token lies before this position
    return F.pad(ids.masked_fill(after, IGNORE), (prefix_length, 0), value=IGNORE)


def captioning_loss(logits: Tensor, labels: Tensor, reduction: Literal["mean", "none"] = "mean") -> Tensor:
    """Cross-entropy of each label under the logits one position before it: the shift is made here and only here.

    The mean is over label tokens, not over samples, as in transformers' own loss.

    Args:
        logits: (B, L, V) of all positions, or (B, K, V) of the last K, of the next token each.
        labels: (B, L) aligned with the inputs, `IGNORE` where there is none.
        reduction: "mean" over the labels of the batch, or "none".

    Returns:
        A scalar, fp32, 0 without any label; or, with "none", (B, K - 1) nats, 0 where there is no label.

    Raises:
        WlsupError: more logits than labels.
    """
    kept = logits.shape[1]
    if kept > labels.shape[1] or kept < 2:
        raise WlsupError(f"Logits of {kept} positions do not belong to labels of {labels.shape[1]}.")
    return _cross_entropy(logits[:, :-1], labels[:, labels.shape[1] - kept + 1 :], reduction)


def prefix_captioning_loss(
    language: LanguageModel, prefix: Tensor, captions: CaptionTokens, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Cross-entropy of captions behind a prefix: the last prefix position predicts the first word.

    Source: Eichenberg et al. 2022 (MAGMA), equation 1; Merullo et al. 2023 (LiMBeR), section 3.

    Args:
        language: the language model.
        prefix: (B, P, W) picture tokens, P >= 1.
        captions: ids and mask (B, T).
        reduction: as `captioning_loss`.

    Returns:
        A scalar; or, with "none", (B, T) nats, 0 at padding.
    """
    embeddings = torch.cat([prefix.float(), language.embed(captions.ids)], dim=1)
    mask = F.pad(captions.mask, (prefix.shape[1], 0), value=True)
    logits = language(embeddings, mask, keep=captions.ids.shape[1] + 1)
    labels = caption_labels(captions.ids, language.tokenizer.end_id, prefix.shape[1])
    return captioning_loss(logits, labels, reduction)


def parallel_inputs(ids: Tensor, parallel: Tensor, mask_id: int, start_id: int) -> Tensor:
    """Return a caption decoder's inputs: mask tokens only, or the caption moved right by one behind a start token.

    Args:
        ids: (B, T).
        parallel: (B,) bool, True where the sample is predicted all at once.
        mask_id: the mask token.
        start_id: the start token.

    Returns:
        (B, T). In both modes position t is to predict ``ids[:, t]``.
    """
    shifted = F.pad(ids, (1, -1), value=start_id)
    return torch.where(parallel[:, None], torch.full_like(ids, mask_id), shifted)


def parallel_attention(parallel: Tensor, length: int) -> Tensor:
    """Return who may look at whom: everybody at everybody in parallel, else nobody at what comes later.

    Args:
        parallel: (B,) bool.
        length: T.

    Returns:
        (B, T, T) bool, True where the row's position may look at the column's. Padding is not taken out: in parallel
        it would give the caption's length away.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=parallel.device).tril()
    return causal | parallel[:, None, None]


def parallel_captioning_loss(
    decoder: CaptionDecoder,
    memory: Tensor,
    captions: CaptionTokens,
    end_id: int,
    fraction: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cross-entropy of captions, a share of the samples predicted all at once and the others word after word.

    Predicted all at once, a word cannot be guessed from the words before it: only the picture helps.

    Source: Tschannen et al. 2023, "Image Captioners Are Scalable Vision Learners Too" (CapPa), section 3: each sample
    is in parallel mode with probability ``fraction`` (0.75 there).

    Args:
        decoder: reads ``memory`` by cross-attention.
        memory: (B, L, D) the encoder's tokens.
        captions: ids and mask (B, T), padded to one length whatever the batch: in parallel the length is an input.
        end_id: the end token.
        fraction: in [0, 1]; 0 is Cap, the plain captioner.
        generator: what to draw the modes from.

    Returns:
        A scalar, fp32: the mean over label tokens.
    """
    ids = captions.ids
    chance = per_sample(
        lambda samples, stream: torch.rand(samples, generator=stream, device=ids.device),
        len(ids),
        ids.device,
        generator,
    )
    parallel = chance < fraction
    inputs = parallel_inputs(ids, parallel, decoder.mask_id, decoder.start_id)
    logits = decoder(inputs, parallel_attention(parallel, ids.shape[1]), memory)
    return _cross_entropy(logits, caption_labels(ids, end_id), "mean")


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: Literal["mean", "none"]) -> Tensor:
    """(B, K, V), (B, K) -> scalar or (B, K), in fp32 under any autocast."""
    with torch.autocast(device_type=logits.device.type, enabled=False):
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
        ).view(targets.shape)
    if reduction == "none":
        return losses
    return mean_over_ranks(losses.sum(), (targets != IGNORE).sum())
