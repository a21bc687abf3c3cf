"""What a captioner learned from pictures: the loss of held-out captions, beside what it is with less to go by.

Shapes: B samples, P prefix positions, W channels of the language model's input embeddings, n held-out captions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wlsup.batch import CaptionBatch, VisionOutput
from wlsup.models.language import GenerationSpec, LanguageModel
from wlsup.objectives.captioning import prefix_captioning_loss

__all__ = [
    "PROTOCOL",
    "SAMPLES",
    "CaptionLosses",
    "caption_losses",
    "captioner_task",
    "generated_captions",
    "interval",
    "likelier_row",
    "loss_rows",
    "next_pictures",
    "said_lines",
]

PROTOCOL = "caption-loss:v1 nats a token over all held-out captions, end tokens counted, padding not; ratio estimate"
SAMPLES = 4
"""Captions that are shown with the measured figures."""


@dataclass(frozen=True)
class CaptionLosses:
    """How surprising held-out captions are.

    Args:
        nats: (n,) fp64, of each caption with its end token.
        tokens: (n,) fp64, how many those are.
    """

    nats: Tensor
    tokens: Tensor

    @property
    def per_token(self) -> float:
        """Nats a token over all captions."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def interval(self) -> list[float] | None:
        """95 % interval of `per_token` over captions, None for a single one.

        Source: Cochran 1977, "Sampling Techniques", section 6.4: the variance of a ratio estimate.
        """
        n = len(self.nats)
        if n < 2:
            return None
        rest = self.nats - self.per_token * self.tokens
        half = 1.96 * float((rest.square().sum() * n / (n - 1)).sqrt() / self.tokens.sum())
        return [self.per_token - half, self.per_token + half]


@torch.no_grad()
def caption_losses(
    language: LanguageModel,
    batches: Sequence[CaptionBatch],
    front: Callable[[CaptionBatch], Tensor] | None = None,
) -> CaptionLosses:
    """Return the loss of each held-out caption behind what ``front`` puts there.

    Args:
        language: the language model, on the batches' device.
        batches: held-out pairs.
        front: a batch to (B, P, W); None: the model's start token, and nothing of the picture.
    """
    nats, tokens = [], []
    for batch in batches:
        device = batch.images.device
        captions = language.tokenizer(batch.captions, device=device)
        if front is None:
            start = torch.tensor([[language.tokenizer.start_id]], device=device)
            before = language.embed(start).expand(len(batch), -1, -1)
        else:
            before = front(batch)
        nats.append(prefix_captioning_loss(language, before, captions, "none").sum(1).double().cpu())
        tokens.append(captions.mask.sum(1).double().cpu())
    return CaptionLosses(torch.cat(nats), torch.cat(tokens))


def next_pictures(see: Callable[[CaptionBatch], VisionOutput]) -> Callable[[CaptionBatch], VisionOutput]:
    """Let ``see`` give each pair of a batch the next pair's picture, and the last one the first's.

    A batch of one, as the last may be, has no other: it is given the first picture of the batch before it.
    """
    before: VisionOutput | None = None

    def see_other(batch: CaptionBatch) -> VisionOutput:
        nonlocal before
        seen, last = see(batch), before
        before = replace(seen, pooled=seen.pooled[:1], tokens=seen.tokens[:1])
        if len(batch) == 1 and last is not None:
            return last
        return replace(seen, pooled=seen.pooled.roll(1, 0), tokens=seen.tokens.roll(1, 0))

    return see_other


def interval(other: CaptionLosses, own: CaptionLosses) -> tuple[float, float]:
    """Return how many nats a token ``other`` is above ``own``, and half the width of the 95 % interval.

    The interval is over captions, paired, by the normal approximation.
    """
    difference, tokens = other.nats - own.nats, float(own.tokens.sum())
    return float(difference.sum()) / tokens, 1.96 * float(difference.std()) * math.sqrt(len(difference)) / tokens


def loss_rows(results: dict[str, CaptionLosses]) -> list[dict[str, Any]]:
    """Return a row of `Approach.measure` for each result, in nats a token."""
    return [
        {"what": what, "value": result.per_token, "unit": "nats", "chance": None, "ci95": result.interval}
        for what, result in results.items()
    ]


def likelier_row(own: CaptionLosses, other: CaptionLosses) -> dict[str, Any]:
    """Return the row that says how often a caption is likelier with its own picture than with the next pair's."""
    share = 100 * float((own.nats < other.nats).double().mean())
    row = {"what": "captions likelier with their own picture", "value": share, "unit": "%", "chance": 50.0}
    return row | {"n": len(own.nats)}


@torch.no_grad()
def generated_captions(
    language: LanguageModel, front: Tensor, batch: CaptionBatch, generation: GenerationSpec
) -> list[dict[str, str]]:
    """Return key, caption and generated caption of the pairs whose pictures ``front`` (B, P, W) holds."""
    said = language.generate(front, generation)
    pairs = zip(batch.keys, batch.captions, said, strict=False)
    return [{"key": key, "caption": caption, "generated": generated} for key, caption, generated in pairs]


def said_lines(captions: list[dict[str, str]]) -> list[str]:
    """Return what was generated, a line each, beside what a person said."""
    return [f"{pair['generated']!r} for {pair['caption']!r}" for pair in captions]


@torch.no_grad()
def captioner_task(
    name: str,
    language: LanguageModel,
    see: Callable[[CaptionBatch], VisionOutput],
    front: Callable[[VisionOutput], Tensor],
    batches: Sequence[CaptionBatch],
    generation: GenerationSpec,
    unadapted: Callable[[], AbstractContextManager],
) -> dict[str, Any]:
    """Measure a captioner whose language model is adapted: with its pictures, with others', and the model alone.

    The gap between the first two is what it takes from the picture; the gap between the last two holds as well what the
    adapters learned of how captions are worded.

    Args:
        name: of the approach.
        language: the language model, adapters attached.
        see: a batch to what the encoder makes of it.
        front: that to picture tokens, (B, P, W).
        batches: held-out pairs, on the model's device; in eval mode.
        generation: how captions are put into words.
        unadapted: makes a context in which the language model is the pretrained one.

    Returns:
        See `Approach.measure`; with "captions", a few generated ones beside those of people. Nothing without batches.
    """
    if not batches:
        return {}
    own = caption_losses(language, batches, lambda batch: front(see(batch)))
    see_other = next_pictures(see)
    other = caption_losses(language, batches, lambda batch: front(see_other(batch)))
    with unadapted():
        alone = caption_losses(language, batches)
    results = {
        "this captioner": own,
        "this captioner, the next pair's picture": other,
        "the language model alone": alone,
    }
    first = see(batches[0])
    few = replace(first, pooled=first.pooled[:SAMPLES], tokens=first.tokens[:SAMPLES])
    captions = generated_captions(language, front(few), batches[0], generation)
    mean, half = interval(other, own)
    finding = f"the next pair's picture: {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] nats a token"
    return {
        "title": f"Caption loss a token, {len(own.nats)} held-out pairs: {name}",
        "rows": [*loss_rows(results), likelier_row(own, other)],
        "note": "\n".join([finding, *said_lines(captions)]),
        "protocol": PROTOCOL,
        "captions": captions,
    }
