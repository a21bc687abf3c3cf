"""The processes over which a batch lies, and sums over them whose gradients are a single process's.

DistributedDataParallel takes the mean over W ranks of the gradients. A sum over ranks therefore has the global value
and, as a gradient, W times this rank's own: the mean over ranks is then what one process with the whole batch has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["alone", "global_sum", "mean_over_ranks", "processes"]

_alone = False


def processes() -> tuple[int, int]:
    """Return over how many processes a batch lies, and which of them this one is; (1, 0) for one that works `alone`."""
    if _alone or not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(), dist.get_rank()


@contextmanager
def alone() -> Iterator[None]:
    """Work on what the other processes have no part in, such as an evaluation by rank 0: nothing is summed over them.

    A sum over the processes waits for all of them, and those that evaluate nothing have gone on.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def global_sum(own: Tensor, over_ranks: bool = True) -> Tensor:
    """Sum over the ranks, the same on each; its gradient is W times the rank's own share.

    Nothing is sent in the backward pass.

    Args:
        own: this rank's numbers, of any shape, with a gradient.
        over_ranks: False: this rank's only.
    """
    world, _ = processes()
    if not over_ranks or world == 1:
        return own
    everyone = own.detach().clone()
    dist.all_reduce(everyone)
    return everyone + world * (own - own.detach())


def mean_over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """Return the mean of what lies on all ranks, such as the loss of all labels of a batch, by `global_sum`.

    Ranks hold different numbers of labels, so a mean of their means is another number.

    Args:
        total: () the sum on this rank, with its graph.
        count: () how many were added up; none at all on every rank give 0.

    Returns:
        () in the dtype of ``total``, the same on all ranks.
    """
    wide = torch.float32 if total.device.type == "mps" else torch.float64  # half precision counts to 2,048 only
    everyones, number = global_sum(torch.stack([total.to(wide), count.to(wide)]))
    return (everyones / number.clamp(min=1)).to(total.dtype)
