"""Checking tar shards: each shard against the index, and then every picture of those that are whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wlsup.data.check import look_at, measure, reader_of
from wlsup.data.check_report import CheckReport, Fault, finished
from wlsup.data.shard_index import INDEX_NAME, ShardIndex, load_index, merge_indices
from wlsup.data.shards import ShardPictures, index_shard
from wlsup.data.sources import CaptionSource
from wlsup.data.stores import TarStore
from wlsup.errors import WlsupError

__all__ = ["check_shards"]

Expected = dict[str, tuple[int, int | None]]
"""Bytes and CRC-32 of shards by their names."""


def check_shards(images: str, *, workers: int = 0, min_side: int = 16, max_words: int = 256) -> CheckReport:
    """Check tar shards anew, whatever their index says: a shard that is cut or missing is a fault like any other.

    Args:
        images: the folder of shards, or one of them.
        workers: processes that decode; 0 for none beside this one.
        min_side: in pixels; a picture with a shorter side is tiny.
        max_words: a caption with more words is overlong.

    Raises:
        WlsupError: if there are no shards.
    """
    path = Path(images).expanduser()
    folder = path.parent if path.is_file() else path
    report = CheckReport("shards")
    expected = _expected(folder, report)
    names = {path.name} if path.is_file() else {shard.name for shard in folder.glob("*.tar")} | set(expected)
    if not names:
        raise WlsupError(f"images: there are no tar shards in {images}. Give the folder with the files ending in .tar.")
    parts = [part for name in sorted(names) if (part := _shard(folder, name, expected, report)) is not None]
    if not parts:
        return finished(report)
    index = merge_indices(parts)
    for position in np.flatnonzero(np.diff(index.captions.starts) == 0).tolist():
        report.faults.append(Fault("captionless", index.keys[position], f"in {index.names[index.shard[position]]}"))
    source = CaptionSource("shards", index.keys, index.captions, ShardPictures(folder, index))
    look_at(report, reader_of(source), workers, min_side)
    measure(report, zip(index.keys, index.captions, strict=True), max_words)
    again = sum(map(len, parts)) - len(index)
    if again:
        report.notes.append(f"{again:,} samples have the key of another: their captions count, their pictures do not")
    return finished(report)


def _expected(folder: Path, report: CheckReport) -> Expected:
    """Return each shard's bytes and CRC-32 by the index, if there is a sound one that has them."""
    if not (folder / INDEX_NAME).exists():
        return {}
    try:
        index = load_index(folder)
    except WlsupError as error:
        report.faults.append(Fault("corrupt", INDEX_NAME, str(error)))
        return {}
    sums = [None] * len(index.names) if index.sums is None else index.sums.tolist()
    return dict(zip(index.names, zip(index.sizes.tolist(), sums, strict=True), strict=True))


def _shard(folder: Path, name: str, expected: Expected, report: CheckReport) -> ShardIndex | None:
    """Index one shard, if it is whole, and report what is wrong with it as an archive."""
    path = folder / name
    if not path.exists():
        report.faults.append(Fault("missing", name, f"the index lists it with {expected[name][0]:,} bytes"))
        return None
    size, (indexed, total) = path.stat().st_size, expected.get(name, (None, None))
    if indexed is not None and size != indexed:
        kind = "truncated" if size < indexed else "corrupt"
        report.faults.append(Fault(kind, name, f"{size:,} bytes, and the index expects {indexed:,}"))
        return None
    try:
        part = index_shard(path)
    except WlsupError as error:
        report.faults.append(Fault("truncated", name, str(error)))
        return None
    if total is not None and int(part.sums[0]) != total:
        report.faults.append(Fault("corrupt", name, "its CRC-32 is not the index's: bytes have changed"))
    report.faults += _hostile(path) if "refused member" in part.broken else ()
    orphans = part.broken.get("text without a picture")
    if orphans:
        report.faults.append(Fault("missing", name, f"{orphans:,} texts without a picture"))
    return part


def _hostile(path: Path) -> Iterator[Fault]:
    for member, why in TarStore(path).refused.items():
        yield Fault("refused", f"{path.name}/{member}", why)
