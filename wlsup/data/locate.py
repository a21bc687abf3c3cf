"""Where a fetched source of captions lies, for commands that are given its name only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from wlsup.data.images import UnreadableImage
from wlsup.data.shards import ShardPictures
from wlsup.data.sources import CaptionSource, Pictures, PicturesPart, StoredPictures

__all__ = ["FileBytes", "source_paths"]

_ALIASES = {"cc3m": "conceptual_captions"}


def source_paths(name: str, captions: str | None, images: str | None, root: Path) -> tuple[str, str | None, str | None]:
    """Return a source's name and paths, those not given being where `wlsup data fetch` puts them.

    Args:
        name: of a source, or of a catalogue entry that one reads.
        captions: as given.
        images: as given; with it, captions are not guessed for a source that can do without.
        root: the folder of all data sets.
    """
    source = _ALIASES.get(name, name)
    if captions is not None or (images is not None and source in {"conceptual_captions", "shards"}):
        return source, captions, images
    candidates: dict[str, tuple[Iterable[Path], Iterable[Path]]] = {
        "coco": (
            [root / "coco/annotations/captions_train2017.json"],
            [root / "coco/train2017", root / "coco/train2017.zip"],
        ),
        "conceptual_captions": (sorted((root / "cc3m").glob("*.tsv")), [root / "cc3m/images"]),
        "imagenet_captions": (
            [root / "imagenet_captions/imagenet_captions.json"],
            [root / "imagenet/train"],
        ),
    }
    texts, pictures = candidates.get(source, ((), ()))
    return source, _first(texts), images or _first(pictures)


def _first(paths: Iterable[Path]) -> str | None:
    return next((str(path) for path in paths if path.exists()), None)


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
