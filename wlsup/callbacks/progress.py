"""Progress that a person, a pipe and a log file can all read."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, RichProgressBar

__all__ = ["PlainProgress", "progress", "training_progress"]

logger = logging.getLogger("wlsup")


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a long piece of work: a bar in a terminal, one line at its end elsewhere.

    Args:
        description: what is under way.

    Yields:
        A function to call with (done, total).
    """
    started = time.perf_counter()
    last = [0, 0]
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=None)

            def show(done: int, total: int) -> None:
                last[:] = done, total
                bar.update(task, completed=done, total=total)

            yield show
    else:

        def note(done: int, total: int) -> None:
            last[:] = done, total

        yield note
    logger.info("%s: %d of %d in %.1f s", description, *last, time.perf_counter() - started)


class PlainProgress(Callback):
    """A line every few seconds: epoch, step, loss, pictures a second and what remains.

    Args:
        seconds: least time between two lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._started = self._last = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._started = self._last = time.perf_counter()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where training is, if the last line is old enough."""
        now = time.perf_counter()
        total = int(trainer.estimated_stepping_batches)
        if now - self._last < self.seconds and trainer.global_step < total:
            return
        self._last = now
        done = max(trainer.global_step - self._first_step, 1)
        rate = done / max(now - self._started, 1e-9)
        logger.info(
            "epoch %d, step %d of %d, loss %.4f, %.0f pictures/s, %.0f s to go",
            trainer.current_epoch + 1,
            trainer.global_step,
            total,
            float(trainer.callback_metrics.get("train/loss", float("nan"))),
            rate * len(batch) * trainer.world_size,
            max(total - trainer.global_step, 0) / rate,
        )


def training_progress() -> list[Callback]:
    """Return the progress callbacks: a bar where there is a terminal, and lines (for the log file) always."""
    bar = [RichProgressBar()] if sys.stderr.isatty() else []
    return [*bar, PlainProgress()]
