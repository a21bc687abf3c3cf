"""A batch encoded a few pictures at a time, in the memory of those few, for a loss over all of it.

Gradient accumulation splits a batch too, but each part then has negatives of its own alone: another, easier loss. Here
only encoding is split. Every part is encoded without keeping activations; the loss over the whole batch then sends each
part's gradient back, and the part is encoded once more for it, with the random state that it had the first time.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache); the
second pass is `torch.utils.checkpoint`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["in_micro_batches"]


def in_micro_batches(encode: Callable[[slice], Tensor], samples: int, size: int | None) -> Tensor:
    """Encode a batch part by part.

    What is drawn for the batch (masks, dropped captions) is to be drawn before, outside of ``encode``: it would be
    another draw otherwise than for the whole batch. What layers draw (dropout) is replayed.

    Args:
        encode: rows of the batch -> (rows, ...), or one number a part, (1,).
        samples: B.
        size: most samples in a part; None: all of them at once, activations kept.

    Returns:
        (B, ...), or one number a part.
    """
    if size is None or size >= samples:
        return encode(slice(0, samples))
    parts = [slice(start, min(start + size, samples)) for start in range(0, samples, size)]
    if not torch.is_grad_enabled():
        return torch.cat([encode(part) for part in parts])
    return torch.cat([checkpoint(encode, part, use_reentrant=False, preserve_rng_state=True) for part in parts])
