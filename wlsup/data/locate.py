"""Where data sets lie, and what there is of each; imports neither torch nor the network."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wlsup.data.catalog import CatalogEntry

__all__ = ["Status", "data_root", "entry_status", "fetched_paths", "source_paths"]

_ALIASES = {"cc3m": "conceptual_captions"}


@dataclass(frozen=True)
class Status:
    """What there is of a data set.

    Args:
        entry: the set.
        folder: where it is looked for.
        missing: markers not there.
        partial: downloads begun and not finished.
    """

    entry: CatalogEntry
    folder: Path
    missing: tuple[str, ...]
    partial: tuple[str, ...]

    @property
    def state(self) -> str:
        """Either complete, partial or missing."""
        if not self.missing:
            return "complete"
        return "partial" if self.partial or len(self.missing) < len(self.entry.markers) else "missing"


def data_root(given: str | Path | None = None) -> Path:
    """Return the folder of all data sets: ``given``, else the environment variable WLSUP_DATA, else ``./data``."""
    return Path(given or os.environ.get("WLSUP_DATA") or "data").expanduser()


def entry_status(entry: CatalogEntry, root: Path) -> Status:
    """Look what there is of ``entry`` under ``root``."""
    folder = root / entry.name
    missing = tuple(marker for marker in entry.markers if next(iter(folder.glob(marker)), None) is None)
    partial = tuple(sorted(path.name.removesuffix(".part") for path in folder.glob("*.part")))
    return Status(entry, folder, missing, partial)


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
    texts, pictures = _candidates(source, root)
    return source, _first(texts), images or _first(pictures)


def fetched_paths(source: str, root: Path) -> tuple[str | None, str | None]:
    """Return where `wlsup data fetch` puts a source's captions and pictures, whether or not they are there.

    Args:
        source: name of a source; (None, None) for one that nothing is fetched for.
        root: the folder of all data sets.
    """
    found = [(_first(paths), paths) for paths in _candidates(source, root)]
    texts, pictures = (there or (str(paths[0]) if paths else None) for there, paths in found)
    return texts, pictures


def _candidates(source: str, root: Path) -> tuple[list[Path], list[Path]]:
    cc3m = sorted((root / "cc3m").glob("*.tsv")) or [root / "cc3m/Train_GCC-training.tsv"]
    return {
        "coco": (
            [root / "coco/annotations/captions_train2017.json"],
            [root / "coco/train2017", root / "coco/train2017.zip"],
        ),
        "conceptual_captions": (cc3m, [root / "cc3m/images"]),
        "imagenet_captions": ([root / "imagenet_captions/imagenet_captions.json"], [root / "imagenet/train"]),
    }.get(source, ([], []))


def _first(paths: Iterable[Path]) -> str | None:
    return next((str(path) for path in paths if path.exists()), None)
