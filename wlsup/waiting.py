"""Waiting for a batch of pictures, and not for ever: what a loader's workers meet, in one sentence."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from wlsup.errors import WlsupError

__all__ = ["END", "PATIENCE", "next_in_time"]

PATIENCE = 900.0
"""Seconds that a run waits for one batch, unless told otherwise."""

END = object()
"""What `next_in_time` returns behind the last batch."""


def next_in_time(batches: Iterator[Any], workers: int, patience: float) -> Any:
    """Return the next batch of a DataLoader's iterator, or `END`.

    With workers the wait ends by the loader's own ``timeout``, whatever they hang in. Without, it ends only in the main
    thread, and not inside a system call that cannot be interrupted.

    Args:
        batches: of ``DataLoader(..., timeout=patience if workers else 0)``.
        workers: processes that read.
        patience: seconds, 0 for ever.

    Raises:
        WlsupError: a worker was killed, or there was no batch in time.
    """
    try:
        with _alarm(0.0 if workers else patience):
            return next(batches, END)
    except _TooLong:
        raise WlsupError(_stalled(patience)) from None
    except RuntimeError as error:
        told = f"{error.__cause__} {error}"
        if killed := re.search(r"is killed by signal: ([^.]+)|exited unexpectedly", told):
            raise WlsupError(_lost(killed[1], workers)) from error
        if "timed out" in str(error):
            raise WlsupError(_stalled(patience)) from error
        raise


def _lost(by: str | None, workers: int) -> str:
    """Return the sentence for a worker that is gone, by a signal or of itself."""
    if by is not None and by not in ("Killed", "SIGKILL"):
        return (
            f"A process that reads pictures died of {by}, as a library that decodes them can. "
            "--data.num_workers 0 (of k-NN: --knn.num_workers) reads in this process, and shows where; then go on with "
            "--resume auto."
        )
    how = "was killed" if by else "ended unexpectedly"
    return (
        f"A process that reads pictures {how}, as the system does to the largest one when memory runs out. "
        f"Lower data.num_workers or knn.num_workers (here {workers}) or ask for more memory, and go on with --resume "
        "auto."
    )


class _TooLong(BaseException):  # noqa: N818 (not an Exception: a data set that skips what it cannot read lets it pass)
    pass


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, where the system can.

    Raises:
        _TooLong: it took longer.
    """
    if not seconds or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _stalled(seconds: float) -> str:
    return (
        f"No batch came in {seconds:g} s: what holds the pictures does not answer. Look at that file system, and go on "
        f"with --resume auto. Training waits data.patience seconds, an evaluation {PATIENCE:g}."
    )
