"""A DataLoader that tells what was skipped, never waits for ever, ends on one clean error, and resumes in mid-epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from wlsup.data.sampler import EpochSampler
from wlsup.errors import WlsupError
from wlsup.waiting import END, PATIENCE, next_in_time

__all__ = ["BatchLoader", "Failure", "make_loader"]


@dataclass
class Failure:
    """An error met in a worker, sent as a batch: raised there, its message would arrive wrapped in a traceback."""

    message: str


def _as_is(batch: Any) -> Any:
    return batch


class BatchLoader(DataLoader):
    """Iterates over ready batches and hands each to ``on_batch`` in the main process first.

    As a stateful loader (``state_dict``, ``load_state_dict``) it lets Lightning save and restore how far into the
    epoch a run was. Since order and augmentation are keyed, skipping that many samples resumes exactly.

    Args:
        *args: as `DataLoader`.
        on_batch: called with each batch before it is yielded; it may raise.
        patience: seconds to wait for one batch, 0 for ever. With workers the wait ends whatever they hang in; without,
            only in the main thread, and not inside a system call that cannot be interrupted.
        **kwargs: as `DataLoader`.

    Raises:
        WlsupError: while it is iterated: a failure in a worker, a worker that was killed, or no batch in time.
    """

    def __init__(
        self, *args: Any, on_batch: Callable[[Any], None] | None = None, patience: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, timeout=patience if kwargs.get("num_workers") else 0, **kwargs)
        self.on_batch = on_batch
        self.patience = patience
        self._batches = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator on purpose: nothing starts, and no position is taken, before the first batch is asked for,
        # since Lightning makes an iterator before it has set the epoch.
        self._batches = 0
        if self._resume is not None and isinstance(self.sampler, EpochSampler):
            self._batches, self._resume = self._resume["batches"], None
            self.sampler.start = self._batches * (self.batch_size or 1)
        batches = super().__iter__()
        try:
            while (batch := next_in_time(batches, self.num_workers, self.patience)) is not END:
                if isinstance(batch, Failure):
                    raise WlsupError(batch.message)
                self._batches += 1
                if self.on_batch is not None:
                    self.on_batch(batch)
                if len(batch):
                    yield batch
        except Exception:
            # At once: workers that the garbage collector finds later may wait out a timeout of five seconds each.
            self._stop_workers(batches)
            raise

    def _stop_workers(self, batches: Any) -> None:
        if self.num_workers:
            batches._shutdown_workers()
            self._iterator = None

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the current epoch were yielded; 0 once it is complete."""
        return {"batches": self._batches % max(len(self), 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration after the batches that ``state`` counts."""
        self._resume = dict(state)


def make_loader(
    dataset: Any,
    sampler: EpochSampler,
    batch_size: int,
    num_workers: int,
    on_batch: Callable[[Any], None] | None,
    patience: float = PATIENCE,
) -> BatchLoader:
    """Build the loader of a data set whose ``__getitems__`` returns whole batches.

    Args:
        dataset: map-style.
        sampler: gives the order.
        batch_size: of this process.
        num_workers: processes that read; 0 reads in this one. The batches are the same whatever the number.
        on_batch: see `BatchLoader`.
        patience: see `BatchLoader`.
    """
    return BatchLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_is,
        on_batch=on_batch,
        patience=patience,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: else each iterator draws a number from torch's global stream, and a resumed run's
        # dropout would differ.
        generator=torch.Generator().manual_seed(0),
    )
