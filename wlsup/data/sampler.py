"""The order of an epoch, as a pure function of (seed, epoch), shared out over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from wlsup.data.keyed import keyed_integer

__all__ = ["EpochSampler"]


class EpochSampler(DistributedSampler):
    """Yields (epoch, index) pairs, so that workers, also persistent ones, learn the epoch with each sample.

    It is a `DistributedSampler` so that Lightning calls ``set_epoch`` on it and does not replace it. Global batch j is
    the same set of samples whatever the number of ranks, as long as ranks x batch size stays the same.

    Args:
        size: number of samples.
        batch_size: of one rank; what does not fill a batch on every rank is left out of that epoch when shuffling.
        seed: of the order.
        rank: this process's, from 0.
        world_size: number of processes.
        shuffle: False for all samples in their own order.
        groups: (size,) the shard each sample lies in, for ``shuffle_window``.
        shuffle_window: shards shuffled together, at least 1; None to shuffle all samples as one. With a window the
            shards come in random order, so many at a time, and the samples of those are shuffled: a file system then
            serves long stretches of few files instead of single pictures of all, at the price of batches that are
            drawn from part of the data.

    Attributes:
        start: samples of this rank to leave out at the beginning of the next iteration: set on resuming mid-epoch.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        groups: Sequence[int] | np.ndarray | None = None,
        shuffle_window: int | None = None,
    ) -> None:
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=True)
        self.size = size
        share = size // (batch_size * world_size) * batch_size if shuffle else len(range(rank, size, world_size))
        self.num_samples = share
        self.total_size = share * world_size
        self.start = 0
        self.groups = None if groups is None or shuffle_window is None else torch.as_tensor(np.asarray(groups))
        self.shuffle_window = shuffle_window

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.start = self.start, 0
        for index in self.order()[start:]:
            yield self.epoch, index

    def order(self) -> list[int]:
        """Return this rank's samples of the current epoch, in order."""
        if not self.shuffle:
            return list(range(self.rank, self.size, self.num_replicas))
        generator = torch.Generator().manual_seed(keyed_integer("order", self.seed, self.epoch) >> 1)
        order = torch.randperm(self.size, generator=generator)
        if self.groups is not None and self.shuffle_window is not None:
            order = self._by_windows(order, generator)
        return order[self.rank : self.num_samples * self.num_replicas : self.num_replicas].tolist()

    def _by_windows(self, order: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Sort a shuffled order by its samples' windows, which are ``shuffle_window`` shards each, drawn at random."""
        shards = torch.unique(self.groups)
        turn = torch.randperm(len(shards), generator=generator)  # of the shard at each position in ``shards``
        window = turn[torch.searchsorted(shards, self.groups)] // self.shuffle_window
        return order[torch.sort(window[order], stable=True).indices]
