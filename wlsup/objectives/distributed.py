"""A batch that lies over several ranks: gathering its rows, and summing gradients back to where they belong.

Shapes: W ranks; rank k holds b_k rows, B = b_0 + ... + b_{W-1} in all, in the order of the ranks. The b_k may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.ranks import processes

__all__ = ["Ranks", "meet"]

# Numbered, so that ranks can tell one another which they hold.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)


@dataclass(frozen=True)
class Ranks:
    """How a batch lies over the ranks of a process group, and the collectives on it. None of them carries a gradient.

    Args:
        sizes: the number of rows on each rank.
        rank: which of them this process is.
        group: the process group; None for the default group, or when there is one rank only.
    """

    sizes: tuple[int, ...]
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def world(self) -> int:
        """Number of ranks, W."""
        return len(self.sizes)

    @property
    def total(self) -> int:
        """Rows on all ranks, B."""
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Position of this rank's first row among the B."""
        return sum(self.sizes[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks, (b_k, ...) -> (B, ...)."""
        if self.world == 1:
            return x
        most = max(self.sizes)
        # Collectives want equal shapes: shorter ranks send padding, which is cut off again on arrival.
        sent = x.contiguous()
        if x.shape[0] < most:
            sent = torch.cat([sent, sent.new_zeros(most - x.shape[0], *x.shape[1:])])
        received = sent.new_empty(self.world * most, *x.shape[1:])
        dist.all_gather(list(received.split(most)), sent, group=self.group)
        if len(set(self.sizes)) == 1:
            return received
        return torch.cat([part[:size] for part, size in zip(received.split(most), self.sizes, strict=True)])

    def scatter_sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks and return this rank's rows of the sum, (B, ...) -> (b_k, ...)."""
        if self.world == 1:
            return x
        if len(set(self.sizes)) == 1:
            own = x.new_empty(self.sizes[self.rank], *x.shape[1:])
            dist.reduce_scatter(own, list(x.contiguous().split(self.sizes[self.rank])), group=self.group)
            return own
        return self.sum(x)[self.offset : self.offset + self.sizes[self.rank]].clone()

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks, the same on each."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def logsumexp(self, x: Tensor) -> Tensor:
        """Return log sum_k exp(x_k) over the ranks, elementwise, the same on each."""
        if self.world == 1:
            return x
        # Where x is -inf on all ranks, a finite maximum keeps -inf minus -inf out.
        most = self._reduce(x, dist.ReduceOp.MAX).clamp_min(torch.finfo(x.dtype).min)
        return self.sum((x - most).exp()).log() + most

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        if self.world == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, op=op, group=self.group)
        return out


def meet(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    problem: str | None = None,
    facts: Sequence[tuple[str, int]] = (),
    wishes: Sequence[bool] = (),
) -> tuple[Ranks, tuple[bool, ...]]:
    """Let all ranks say what they bring, so that they go on together or all stop with one clear error.

    One small collective. A rank that found its own input wrong still takes part, with ``problem``: the others would
    otherwise wait for it until the group's time-out.

    Args:
        x: (b_k, ...) this rank's rows. The row's shape and the dtype must be the same on all ranks, b_k need not.
        group: the process group; None means the default group if ``torch.distributed`` is initialised.
        problem: why this rank cannot go on, or None.
        facts: (name, number) pairs on which all ranks must agree, in the same order everywhere.
        wishes: granted where at least one rank has the wish.

    Returns:
        The layout, and the wishes granted.

    Raises:
        WlsupError: this rank has a ``problem``, another rank has one, or the ranks disagree.
    """
    if processes()[0] == 1 or dist.get_world_size(group) == 1:
        if problem:
            raise WlsupError(problem)
        return Ranks((len(x),)), tuple(wishes)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise WlsupError("This process is not in the process group it was given; pass a group that contains it.")
    if problem is None and (x.dim() == 0 or x.dtype not in _DTYPES):
        problem = f"Rows to gather must be a tensor of {_DTYPES} with dimensions; got {x.dtype} {tuple(x.shape)}."
    ok = problem is None
    width, dtype = (x.shape[1:].numel(), _DTYPES.index(x.dtype)) if ok else (-1, -1)
    agreed = [("row width", width), ("dtype", dtype), *facts]
    header = [int(ok), x.shape[0] if ok else 0, *(n for _, n in agreed), *(int(w) for w in wishes)]
    mine = torch.tensor(header, dtype=torch.int64, device=x.device)
    table = mine.new_empty(world * len(header))
    dist.all_gather(list(table.split(len(header))), mine, group=group)
    rows = table.view(world, -1).tolist()
    if problem:
        raise WlsupError(problem)
    refused = [k for k, row in enumerate(rows) if not row[0]]
    if refused:
        raise WlsupError(f"Rank(s) {refused} of {world} could not use their batch; their own message says why.")
    for column, (name, _) in enumerate(agreed, start=2):
        values = [row[column] for row in rows]
        if len(set(values)) > 1:
            shown = [str(_DTYPES[v]) for v in values] if name == "dtype" else values
            raise WlsupError(
                f"The ranks disagree on the {name}: {shown} on ranks 0 to {world - 1}. It must be the same."
            )
    granted = tuple(any(row[2 + len(agreed) + i] for row in rows) for i in range(len(wishes)))
    return Ranks(tuple(row[1] for row in rows), rank, group), granted
