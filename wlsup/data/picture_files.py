"""Picture files by position, undecoded: what checking looks at and shards are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from wlsup.data.images import UnreadableImage
from wlsup.data.shards import ShardPictures
from wlsup.data.sources import CaptionSource, Pictures, PicturesPart, StoredPictures
from wlsup.data.stores import ImageStore

__all__ = ["FileBytes", "PictureFiles", "StoreFiles"]


class PictureFiles(Protocol):
    """Picture files by position; picklable."""

    def read(self, index: int) -> bytes:
        """Return the content of file ``index``; raise `UnreadableImage` saying why not."""
        ...

    def problem(self, index: int) -> str | None:
        """Say why file ``index`` cannot be had at all, or None."""
        ...


@dataclass
class StoreFiles:
    """Files of a store.

    Args:
        store: where they lie.
        names: as the store knows them.
    """

    store: ImageStore
    names: Sequence[str]

    def read(self, index: int) -> bytes:
        """Return the content of file ``index``; Raises `UnreadableImage` saying why not."""
        return self.store.read(self.names[index])

    def problem(self, index: int) -> str | None:
        """Say why file ``index`` cannot be had at all, or None."""
        return self.store.problem(self.names[index])


class FileBytes:
    """The content of a source's picture files, by position, undecoded.

    Args:
        source: of captions.

    Attributes:
        available: whether the source's pictures are files at all.
    """

    def __init__(self, source: CaptionSource) -> None:
        pictures: Pictures = source.pictures
        self._indices: Sequence[int] | None = None
        while isinstance(pictures, PicturesPart):
            inner = pictures.indices
            self._indices = inner if self._indices is None else [inner[index] for index in self._indices]
            pictures = pictures.whole
        self._pictures = pictures
        self.available = isinstance(pictures, (StoredPictures, ShardPictures))

    def read(self, index: int) -> bytes:
        """Return the file of picture ``index``.

        Raises:
            UnreadableImage: saying why not.
        """
        index = index if self._indices is None else self._indices[index]
        if isinstance(self._pictures, StoredPictures):
            return self._pictures.store.read(self._pictures.names[index])
        if isinstance(self._pictures, ShardPictures):
            return self._pictures.bytes_of(index)
        raise UnreadableImage("has no file of its own")

    def problem(self, index: int) -> str | None:
        """Say why the file cannot be had at all, if its store knows."""
        index = index if self._indices is None else self._indices[index]
        if isinstance(self._pictures, StoredPictures):
            return self._pictures.store.problem(self._pictures.names[index])
        return None
