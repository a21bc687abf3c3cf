"""What a check found: the kinds of faults, each fault by name, and how long the captions are."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

__all__ = ["FAULTS", "CheckReport", "Fault", "count_words", "finished"]

FAULTS = {
    "missing": "listed, but not there",
    "refused": "a name or link that leads out of its place",
    "unreadable": "the file cannot be read",
    "zero-byte": "an empty file",
    "truncated": "the file lacks its end",
    "corrupt": "the file cannot be decoded",
    "huge": "a decompression bomb: too many pixels, too elongated, or too large a file",
    "tiny": "too few pixels to be a picture",
    "duplicate": "byte for byte another picture, or the same row or name twice",
    "captionless": "no caption",
    "overlong": "a caption of very many words",
    "not-utf-8": "bytes that are not valid text",
    "count": "not as many samples as there should be",
}
"""Kinds of fault, and what each means."""

_EDGES = (1, 3, 5, 8, 10, 15, 20, 30, 50, 100, 200)


@dataclass(frozen=True, order=True)
class Fault:
    """One thing wrong.

    Args:
        kind: one of `FAULTS`.
        name: of the picture, or the row.
        detail: one line.
    """

    kind: str
    name: str
    detail: str = ""


@dataclass
class CheckReport:
    """What a check found.

    Args:
        source: what was checked.
        pictures: number of pictures looked at.
        captions: number of captions.
        bytes: of the pictures' files.
        faults: everything wrong, sorted.
        traits: names of pictures by oddity that is read correctly, such as "cmyk".
        notes: further remarks.
        caption_words: statistics and histogram of the captions' lengths in words.
    """

    source: str
    pictures: int = 0
    captions: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    traits: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    caption_words: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of faults by kind, in the order of `FAULTS`."""
        counted = Counter(fault.kind for fault in self.faults)
        return {kind: counted[kind] for kind in FAULTS if counted[kind]}

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "source": self.source,
            "clean": not self.faults,
            "pictures": self.pictures,
            "captions": self.captions,
            "bytes": self.bytes,
            "faults": self.counts,
            "faulty": [{"kind": fault.kind, "name": fault.name, "detail": fault.detail} for fault in self.faults],
            "traits": self.traits,
            "notes": self.notes,
            "caption_words": self.caption_words,
        }


def count_words(lengths: Sequence[int]) -> dict[str, Any]:
    """Return statistics and the histogram of lengths in words."""
    if not lengths:
        return {}
    histogram = {
        (f"{low}" if high - low == 1 else f"{low}-{high - 1}"): sum(low <= length < high for length in lengths)
        for low, high in pairwise(_EDGES)
    }
    histogram[f">={_EDGES[-1]}"] = sum(length >= _EDGES[-1] for length in lengths)
    return {
        "lengths": list(lengths),
        "min": min(lengths),
        "median": statistics.median(lengths),
        "mean": round(statistics.fmean(lengths), 2),
        "max": max(lengths),
        "histogram": histogram,
    }


def finished(report: CheckReport) -> CheckReport:
    """Put a report in order, once all has been added; return it."""
    report.faults.sort()
    report.traits = {trait: sorted(names) for trait, names in sorted(report.traits.items())}
    report.caption_words.pop("lengths", None)
    return report
