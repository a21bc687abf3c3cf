"""What is there of a file whose download has begun, in a form that survives a kill."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["DownloadState", "Piece"]


@dataclass
class Piece:
    """A piece of the file.

    Args:
        start: of its bytes.
        end: of its bytes, exclusive; None where the length is not known.
        done: how many of them are there.
    """

    start: int
    end: int | None
    done: int = 0

    @property
    def complete(self) -> bool:
        """Whether all bytes are there."""
        return self.end is not None and self.start + self.done >= self.end


@dataclass
class DownloadState:
    """What ``x.part.json`` holds.

    Args:
        url: address of the file.
        total: its length in bytes, if the server says it.
        validator: ETag or date by which a version of the file is known, if the server gives one.
        pieces: in the order of the file.
    """

    url: str
    total: int | None
    validator: str | None
    pieces: list[Piece] = field(default_factory=list)

    def text(self) -> str:
        """Return it as JSON, for `read`."""
        pieces = [[piece.start, piece.end, piece.done] for piece in self.pieces]
        return json.dumps({"url": self.url, "total": self.total, "validator": self.validator, "pieces": pieces})

    @classmethod
    def read(cls, path: Path) -> DownloadState | None:
        """Return what the file at ``path`` holds; None if it is missing or damaged."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(found["url"], found["total"], found["validator"], [Piece(*piece) for piece in found["pieces"]])
        except (OSError, ValueError, KeyError, TypeError):
            return None
