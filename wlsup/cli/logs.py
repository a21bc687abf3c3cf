"""Where the suite's own lines go: the terminal, and the run's log file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

__all__ = ["log_to_file", "log_to_terminal"]

# Remarks of the libraries that say nothing a user of this suite can act on.
_IDLE_WARNINGS = (
    ".*LightningCLI's args parameter is intended.*",
    ".*does not have many workers.*",
    ".*The number of training batches.*is smaller than the logging interval.*",
    ".*LeafSpec.*is deprecated.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Found .* module.*in eval mode at the start of training.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*torch.jit.*deprecated.*",
    ".*lr_scheduler.step\\(\\).* before .*optimizer.step\\(\\).*",
    ".*Total length of .* across ranks is zero.*",
    ".*The dirpath has changed from .*",
    ".*Starting from v1.9.0, `tensorboardX` has been removed.*",
)


class _Terminal(logging.StreamHandler):
    """Writes to whatever standard error is at the time: it may be captured or redirected after this was made."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        pass


def log_to_terminal(quiet: bool = False) -> None:
    """Send the suite's lines to standard error, and keep the libraries to their warnings."""
    logger = logging.getLogger("wlsup")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        handler = _Terminal()
        handler.setFormatter(logging.Formatter("%(message)s"))
        if sys.stderr.isatty():
            # a bar shows what these lines would say
            handler.addFilter(lambda record: record.levelno > logging.INFO or record.module != "progress")
        logger.addHandler(handler)
    for handler in logger.handlers:
        if isinstance(handler, _Terminal):
            handler.setLevel(logging.WARNING if quiet else logging.INFO)
    for name in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
        logging.getLogger(f"lightning.{name}.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    # read by transformers when it is imported: loading a frozen encoder needs no bar of its own
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for pattern in _IDLE_WARNINGS:
        warnings.filterwarnings("ignore", pattern)


class _File(logging.FileHandler):
    """A log file that cannot be written says nothing: the lines are on the terminal, and the run tells of the disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Go on."""


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Also write the suite's lines, with the time, to ``path`` for as long as the work lasts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _File(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("wlsup").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("wlsup").removeHandler(handler)
        with suppress(OSError):
            handler.close()
