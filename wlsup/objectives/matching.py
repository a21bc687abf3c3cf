"""Matching: which of a few captions belongs to a picture, judged by looking at both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wlsup.batch import Condition
from wlsup.errors import WlsupError

__all__ = ["MatchingSpec", "matching_loss"]


@dataclass(frozen=True)
class MatchingSpec:
    """How matching is trained.

    Args:
        weight: factor of the matching loss.
        negatives: captions of other pictures of the process's own batch that stand beside the right one.
    """

    weight: float = 1.0
    negatives: int = 3

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.negatives < 1:
            raise WlsupError(
                f"matching.weight must be > 0 and matching.negatives >= 1, not {self.weight} and {self.negatives}."
            )


def matching_loss(
    score: Callable[[Condition], Tensor], captions: Condition, negatives: int, keys: Sequence[str] | None = None
) -> Tensor:
    """Cross-entropy of a picture's own caption among ``negatives`` others of the batch.

    Each pair is scored by the same function, the right one like the wrong ones, so that nothing but how well picture
    and caption fit can tell them apart: at chance the loss is ``ln(1 + negatives)``.

    Over several processes the others are of each process's own batch, where a contrastive loss has those of all: the
    negatives are then not those of one process with the same pairs.

    Source: Li et al. 2021 (ALBEF), section 3.2, image-text matching, there as two-way classification of one pair and
    one mismatched pair; a choice among several captions is ours.

    Args:
        score: R * B captions, caption ``r * B + i`` to be held against picture i, to (B, R) scores.
        captions: B captions, those of the pictures in order.
        negatives: how many others, at most B - 1.
        keys: B names of the pictures; captions of the same picture are no negatives.

    Returns:
        A scalar.
    """
    batch = len(captions.present)
    shifts = range(min(negatives, batch - 1) + 1)
    order = torch.cat([torch.arange(batch).roll(-shift) for shift in shifts])
    index = order.to(captions.present.device)
    candidates = Condition(
        *(part[index] for part in (captions.tokens, captions.mask, captions.pooled, captions.present))
    )
    scores = score(candidates)
    if keys is not None:
        same = [[shift > 0 and keys[i] == keys[(i + shift) % batch] for shift in shifts] for i in range(batch)]
        scores = scores.masked_fill(torch.tensor(same, device=scores.device), float("-inf"))
    return F.cross_entropy(scores.float(), torch.zeros(batch, dtype=torch.long, device=scores.device))
