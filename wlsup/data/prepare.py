"""``wlsup data prepare``: any source of captions as tar shards with an index, or the index of shards that exist."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from wlsup.data.fetch import check_space
from wlsup.data.images import PICTURE_SUFFIXES, UnreadableImage
from wlsup.data.locate import source_paths
from wlsup.data.picture_files import FileBytes
from wlsup.data.progress import progress
from wlsup.data.shard_index import load_index, save_index, verify_shards
from wlsup.data.shards import ShardSample, build_index, write_shards
from wlsup.data.sources import CaptionSource, SourceRequest, load_source
from wlsup.data.subset import manifest_sha256
from wlsup.errors import WlsupError
from wlsup.files import write_json

__all__ = ["prepare"]

RECORD = "wlsup-prepared.json"
_SUFFIXES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
_log = logging.getLogger("wlsup.data")


def prepare(
    name: str,
    out: Path | None,
    *,
    root: Path,
    captions: str | None = None,
    images: str | None = None,
    options: Mapping[str, Any] | None = None,
    shard_size: int = 2000,
) -> dict[str, Any]:
    """Write a source's pictures and captions into tar shards, in the order of their keys.

    The shards are written beside ``out`` and moved there once they are whole; a run that finds the same source there
    already does nothing. Pictures are copied byte for byte.

    Args:
        name: of the source; for "shards" only the index is made, in the folder ``images``.
        out: the new folder.
        root: where fetched sets lie, for paths not given.
        captions: as the source takes it.
        images: likewise.
        options: of the source.
        shard_size: pairs a shard.

    Returns:
        ``out``, ``samples``, ``shards``, ``bytes``, ``skipped`` {key: reason}, ``manifest_sha256`` of the keys, and
        ``new``: whether anything was written.

    Raises:
        WlsupError: if the source cannot be read, ``out`` holds something else, or the disk is too small.
    """
    name, captions, images = source_paths(name, captions, images, root)
    if name == "shards":
        return _index_only(images)
    if out is None:
        raise WlsupError("prepare needs --out DIR: the new folder of shards.")
    source = load_source(name, SourceRequest(captions=captions, images=images, max_bad_fraction=1.0), options)
    for note in source.notes:
        _log.warning("%s: %s", name, note)
    request = {
        "source": name,
        "captions": captions,
        "images": images,
        "options": dict(options or {}),
        "shard_size": shard_size,
        "source_sha256": _fingerprint(source),
    }
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        return _already(out, request)
    partial = out.with_name(f".{out.name}.preparing")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    files, skipped = FileBytes(source), dict(source.dropped)
    check_space(out.parent, _size_of(files, len(source.keys)), f"A copy of {name} in {out}")
    try:
        with progress(f"prepare {name}", unit="pairs") as show:
            index = write_shards(
                _samples(source, files, skipped),
                partial,
                samples_per_shard=shard_size,
                progress=lambda done: show(done, len(source.keys)),
            )
        report = {
            "out": str(out),
            "samples": len(index),
            "shards": len(index.names),
            "bytes": int(index.sizes.sum()),
            "manifest_sha256": manifest_sha256(index.keys),
            "skipped": skipped,
        }
        write_json(partial / RECORD, {"request": request, "report": report})
        if out.is_dir():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        raise WlsupError(f"The shards cannot be written to {out}: {error}. Check the disk.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**report, "new": True}


def _samples(source: CaptionSource, files: FileBytes, skipped: dict[str, str]) -> Iterator[ShardSample]:
    for index, (key, captions) in enumerate(zip(source.keys, source.captions, strict=True)):
        try:
            data = files.read(index) if files.available else _encoded(source, index)
            if not data:
                raise UnreadableImage("zero bytes")
        except UnreadableImage as error:
            skipped[key] = error.reason
            continue
        yield ShardSample(key, data, _suffix(key, data), captions)


def _encoded(source: CaptionSource, index: int) -> bytes:
    """Return a picture that has no file as a PNG, which loses nothing."""
    buffer = io.BytesIO()
    Image.fromarray(source.pictures.read(index).permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _suffix(key: str, data: bytes) -> str:
    """Name the format by the content: scraped files are called .jpg whatever they are."""
    for mark, suffix in _SUFFIXES.items():
        if data.startswith(mark):
            return suffix
    named = Path(key).suffix.lower()
    return named if named in PICTURE_SUFFIXES else ".jpg"


def _size_of(files: FileBytes, number: int) -> int:
    """Estimate the bytes of all pictures from a few of them."""
    sizes = []
    for index in range(0, number, max(number // 64, 1)):
        try:
            sizes.append(len(files.read(index)) + 2048)
        except UnreadableImage:
            continue
    return round(sum(sizes) / len(sizes) * number) if sizes else 0


def _fingerprint(source: CaptionSource) -> str:
    """Return a SHA-256 over keys and captions, to tell whether a folder holds this very source."""
    digest = hashlib.sha256()
    for key, captions in zip(source.keys, source.captions, strict=True):
        digest.update(json.dumps([key, list(captions)]).encode())
    return digest.hexdigest()


def _already(out: Path, request: dict[str, Any]) -> dict[str, Any]:
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if record.get("request") != json.loads(json.dumps(request)):
        raise WlsupError(f"--out {out} is not empty, and holds something else. Give a new folder, or delete it first.")
    verify_shards(load_index(out), out)
    _log.info("%s holds these shards already", out)
    return {**record["report"], "out": str(out), "new": False}


def _index_only(images: str | None) -> dict[str, Any]:
    if images is None:
        raise WlsupError("prepare shards needs --images DIR: the folder of tar shards to index.")
    folder = Path(images).expanduser()
    with progress("index shards", unit="shards") as show:
        index = build_index(sorted(folder.glob("*.tar")), show)
    save_index(index, folder)
    return {
        "out": str(folder),
        "samples": len(index),
        "shards": len(index.names),
        "bytes": int(index.sizes.sum()),
        "manifest_sha256": manifest_sha256(index.keys),
        "skipped": {reason: f"{count:,} samples" for reason, count in index.broken.items()},
        "new": True,
    }
