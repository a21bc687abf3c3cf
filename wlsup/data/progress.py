"""Progress of long data work: a bar in a terminal, a plain line now and then elsewhere, and one at the end."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["human_bytes", "progress"]

_log = logging.getLogger("wlsup.data")


def human_bytes(count: float) -> str:
    """Write a number of bytes for people: ``170 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def progress(description: str, *, unit: str = "", seconds: float = 10.0) -> Iterator[Callable[[int, int | None], None]]:
    """Show how far a piece of work is.

    Args:
        description: what is under way.
        unit: of what is counted, such as "pictures"; "bytes" is written as MB.
        seconds: least time between two plain lines.

    Yields:
        A function to call with (done, total), from any thread; total is None where it is not known.
    """
    started = last = time.monotonic()
    state: list[int | None] = [0, None]
    lock = threading.Lock()

    def line() -> str:
        done, total = state
        elapsed = max(time.monotonic() - started, 1e-9)
        write = human_bytes if unit == "bytes" else "{:,.0f}".format
        of = f" of {write(total)}" if total else ""
        rest = "" if unit == "bytes" or not unit else f" {unit}"
        return f"{description}: {write(done)}{of}{rest}, {write(done / elapsed)}/s, {elapsed:.0f} s"

    def note(done: int, total: int | None) -> None:
        nonlocal last
        with lock:
            state[:] = done, total
            now = time.monotonic()
            if now - last < seconds:
                return
            last = now
        _log.info("%s", line())

    if not sys.stderr.isatty():
        yield note
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=None, said="")

            def show(done: int, total: int | None) -> None:
                note(done, total)
                bar.update(task, completed=done, total=total, said=line().removeprefix(f"{description}: "))

            yield show
    _log.info("%s", line())
