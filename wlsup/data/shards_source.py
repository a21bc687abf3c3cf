"""Source `shards`: tar shards of pictures and captions, as webdataset, img2dataset and `wlsup data prepare` write."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from wlsup.data.shard_index import INDEX_NAME, ShardIndex, load_index, save_index, verify_shards
from wlsup.data.shards import ShardPictures, build_index
from wlsup.data.sources import CaptionSource, SourceRequest, register
from wlsup.data.staged import staged
from wlsup.errors import WlsupError

__all__ = ["open_shards", "read_shards", "shards_source"]

_log = logging.getLogger("wlsup.data")


@register("shards")
def shards_source(request: SourceRequest) -> CaptionSource:
    """Read tar shards through their index; without one, one is made, and kept where the folder can be written.

    Args:
        request: ``images`` is the folder of shards, or one of them; ``captions`` must not be given.

    Raises:
        WlsupError: if there are no shards, or one is missing, cut short or damaged.
    """
    return read_shards(request, "shards")


def read_shards(request: SourceRequest, name: str) -> CaptionSource:
    """Read shards for the source ``name``; see `shards_source`."""
    if request.captions is not None:
        raise WlsupError(
            f"captions={request.captions!r} was given with source {name!r}, which has its captions in the shards. "
            "Leave captions unset, and give images: the folder of shards."
        )
    if request.images is None:
        raise WlsupError(f"Source {name!r} needs images: the folder of tar shards.")
    folder, index = open_shards(request.images)
    captioned = np.flatnonzero(np.diff(index.captions.starts))
    order = np.array(sorted(captioned.tolist(), key=index.keys.__getitem__), np.int64)
    notes = [f"{count:,} samples: {reason}" for reason, count in index.broken.items()]
    return CaptionSource(
        name=name,
        keys=index.keys.take(order),
        captions=index.captions.take(order),
        pictures=ShardPictures(folder, index, order),
        notes=notes,
    )


def open_shards(path: str | Path) -> tuple[Path, ShardIndex]:
    """Return the folder and the verified index of tar shards.

    Args:
        path: the folder, or one shard in it, which is then used alone.

    Raises:
        WlsupError: see `shards_source`.
    """
    path = staged(Path(path).expanduser())
    if path.is_file():
        if (path.parent / INDEX_NAME).exists():
            verify_shards(load_index(path.parent), path.parent, only=path.name)
        return path.parent, build_index([path])
    if not path.is_dir():
        raise WlsupError(f"images: no such folder of shards: {path}. Looked in {Path.cwd()}; give a path that exists.")
    shards = sorted(path.glob("*.tar"))
    if (path / INDEX_NAME).exists():
        index = load_index(path)
        verify_shards(index, path)
        unlisted = sorted({shard.name for shard in shards} - set(index.names))
        if unlisted:
            raise WlsupError(
                f"{path} holds {len(unlisted)} shards that its index does not list, such as {unlisted[0]!r}. Delete "
                f"{INDEX_NAME} and run `wlsup data prepare`, or move them away."
            )
        return path, index
    if not shards:
        raise WlsupError(f"{path} holds no tar shards. Give the folder with the files ending in .tar.")
    _log.warning("indexing %d shards of %s; `wlsup data prepare` does it once and for all", len(shards), path)
    index = build_index(shards)
    try:
        save_index(index, path)
    except OSError as error:
        _log.warning("the index could not be kept in %s (%s): each start will make it again", path, error.strerror)
    return path, index
