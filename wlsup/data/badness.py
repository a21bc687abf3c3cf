"""Counting samples that cannot be had or read, and stopping a run that is rotten."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import islice

from wlsup.errors import WlsupError

__all__ = ["BadSampleCounter"]

_SHOWN = 5
_LOGGED = 20

_log = logging.getLogger("wlsup.data")


class BadSampleCounter:
    """Counts each bad sample once, whatever the number of epochs and workers that meet it.

    Args:
        max_bad_fraction: in [0, 1): the highest tolerated fraction of bad samples.

    Attributes:
        skipped: key and reason.
    """

    def __init__(self, max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.skipped: dict[str, str] = {}
        self._expected: dict[str, tuple[int, int]] = {}
        self._dropped = 0
        self._noted = 0

    def admit(self, dropped: Mapping[str, str], listed: int) -> None:
        """Take note of what a source leaves out before training.

        Args:
            dropped: key and reason.
            listed: number of samples the source lists, the dropped ones included.

        Raises:
            WlsupError: if too many are dropped.
        """
        self.skipped.update(dropped)
        self._dropped = len(self.skipped)
        self._check(len(dropped), listed)

    def expect(self, part: str, share: int, total: int) -> None:
        """Say how many samples are coming, to hold the number of bad ones against.

        Args:
            part: "train" or "validation"; the parts add up.
            share: samples of the part that this process meets in an epoch.
            total: samples of the part.
        """
        self._expected[part] = (share, total)

    def note(self, skipped: Iterable[str], size: int) -> None:
        """Take note of what a batch reports.

        Args:
            skipped: "key: reason" strings.
            size: samples in the batch.

        Raises:
            WlsupError: if, with these, too many of this process's samples are bad.
        """
        self._noted += size
        for entry in skipped:
            key, _, reason = entry.partition(": ")
            if key in self.skipped:
                continue
            self.skipped[key] = reason
            found = len(self.skipped) - self._dropped
            if found <= _LOGGED:
                _log.warning("skipped %s: %s%s", key, reason, " (more are counted only)" if found == _LOGGED else "")
            # A rank meets its share in the first epoch and, reshuffled, other ranks' samples in later ones.
            share, total = (sum(column) for column in zip(*self._expected.values(), strict=True))
            self._check(found, max(share, min(total, self._noted)))

    def _check(self, bad: int, of: int) -> None:
        if bad <= self.max_bad_fraction * of:
            return
        shown = "; ".join(f"{key} ({reason})" for key, reason in islice(self.skipped.items(), _SHOWN))
        more = f" and {len(self.skipped) - _SHOWN} more" if len(self.skipped) > _SHOWN else ""
        raise WlsupError(
            f"{bad} of {of} samples cannot be used, more than max_bad_fraction={self.max_bad_fraction:g} allows: "
            f"{shown}{more}. Repair or remove them, or raise max_bad_fraction."
        )
