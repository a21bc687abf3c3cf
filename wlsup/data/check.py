"""``wlsup data check``: every sample read, every fault named, before a run meets them one by one."""

from __future__ import annotations

import statistics
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from wlsup.data.inspection import DecodedReader, FileReader, PictureReader, inspect_all
from wlsup.data.progress import progress
from wlsup.data.sources import CaptionSource, Pictures, PicturesPart, SourceRequest, StoredPictures, load_source
from wlsup.data.stores import ImageStore, TarStore, clean_name, open_store
from wlsup.data.table import CAPTION_COLUMNS, IMAGE_COLUMNS, resolve_prefix
from wlsup.data.tabular import mend_text, read_table
from wlsup.errors import WlsupError

__all__ = ["FAULTS", "CheckReport", "Fault", "check_folder", "check_source", "check_table"]

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


def check_table(
    captions: str,
    images: str | None,
    *,
    options: Mapping[str, Any] | None = None,
    workers: int = 0,
    min_side: int = 16,
    max_words: int = 256,
) -> CheckReport:
    """Check a table of image names and captions, row by row, and the pictures.

    Args:
        captions: the table.
        images: folder or tar of the pictures; None for the table's own folder.
        options: as the source `table` takes them.
        workers: processes that decode; 0 for none beside this one.
        min_side: in pixels; a picture with a shorter side is tiny.
        max_words: a caption with more words is overlong.

    Raises:
        WlsupError: if the table or the store cannot be read at all.
    """
    options = dict(options or {})
    reading = {name: options[name] for name in ("delimiter", "header", "encoding") if name in options}
    table = read_table(captions, **reading)
    image = table.column("image_column", options.get("image_column"), IMAGE_COLUMNS)
    text = table.column("caption_column", options.get("caption_column"), CAPTION_COLUMNS)
    store = open_store(images if images is not None else table.path.parent)
    report = CheckReport("table")
    captions_of: dict[str, list[str]] = {}
    undecodable = set(table.undecodable)
    for row in table.rows:
        name, cell = row.values[image], row.values[text]
        key = clean_name(name) if isinstance(name, str) and name.strip() else ""
        label = key or f"{table.path.name}, line {row.line}"
        if row.line in undecodable:
            report.faults.append(Fault("not-utf-8", label, f"line {row.line}"))
        found = [" ".join(mend_text(value)[0].split()) for value in _listed(cell) if isinstance(value, str)]
        found = [caption for caption in found if caption]
        if not key:
            report.faults.append(Fault("missing", label, "the row names no picture"))
            continue
        known = captions_of.setdefault(key, [])
        if not found:
            report.faults.append(Fault("captionless", label, f"line {row.line}"))
        for caption in found:
            if caption in known:
                report.faults.append(Fault("duplicate", label, f"line {row.line}: same picture, same caption"))
            known.append(caption)
    prefix = options.get("image_prefix")
    prefix = resolve_prefix(store, list(captions_of)) if prefix is None else prefix
    keys = list(captions_of)
    _look_at(report, FileReader(store, [prefix + key for key in keys], keys), workers, min_side)
    _look_at_archive(report, store)
    _measure(report, captions_of, max_words)
    unlisted = len(set(store.names()).difference(prefix + key for key in keys))
    if unlisted:
        report.notes.append(f"{unlisted:,} pictures in {store.path} are in no row of {table.path.name}")
    return _finished(report)


def check_source(
    name: str,
    request: SourceRequest,
    *,
    options: Mapping[str, Any] | None = None,
    workers: int = 0,
    min_side: int = 16,
    max_words: int = 256,
) -> CheckReport:
    """Check any source of captions: what it leaves out, and every picture it gives.

    Args:
        name: one of the sources.
        request: paths.
        options: the source's own.
        workers: as `check_table`.
        min_side: likewise.
        max_words: likewise.
    """
    report = CheckReport(name)
    source = load_source(name, request, options)
    parts = [source] if source.validation is None else [source, source.validation]
    for part in parts:
        for key, why in part.dropped.items():
            report.faults.append(Fault(_kind_of(why), key, why))
        report.notes += part.notes
        _look_at(report, _reader(part), workers, min_side)
        _measure(report, dict(zip(part.keys, part.captions, strict=True)), max_words)
    return _finished(report)


def check_folder(images: str, *, workers: int = 0, min_side: int = 16) -> CheckReport:
    """Check all pictures of a folder or tar, with or without captions; arguments as `check_table`."""
    store = open_store(images)
    names = store.names()
    if not names:
        raise WlsupError(f"images: there is no picture in {images}. Give a folder or tar that holds some.")
    report = CheckReport("folder")
    _look_at(report, FileReader(store, names, names), workers, min_side)
    _look_at_archive(report, store)
    return _finished(report)


def _listed(cell: object) -> Sequence[object]:
    return cell if isinstance(cell, list) else [cell]


def _kind_of(why: str) -> str:
    if "caption" in why:
        return "captionless"
    return "refused" if why.startswith("refused") else "missing"


def _reader(source: CaptionSource) -> PictureReader:
    """Look at files where the source has files, and at decoded pictures where it has none."""
    pictures: Pictures = source.pictures
    indices: Sequence[int] = range(len(source.keys))
    while isinstance(pictures, PicturesPart):
        indices = [pictures.indices[index] for index in indices]
        pictures = pictures.whole
    if isinstance(pictures, StoredPictures):
        return FileReader(pictures.store, [pictures.names[index] for index in indices], source.keys)
    return DecodedReader(source.pictures, source.keys)


def _look_at(report: CheckReport, reader: PictureReader, workers: int, min_side: int) -> None:
    """Inspect pictures and add what is found; of pictures with the same bytes all but the first by name are named."""
    same: dict[str, list[str]] = {}
    with progress(f"check {report.source}", unit="pictures") as show:
        for facts in inspect_all(reader, workers=workers, min_side=min_side, report=show):
            report.pictures += 1
            report.bytes += facts.size
            if facts.fault:
                report.faults.append(Fault(facts.fault, facts.name, facts.detail))
            elif facts.digest:
                same.setdefault(facts.digest, []).append(facts.name)
            for trait in facts.traits:
                report.traits.setdefault(trait, []).append(facts.name)
    for names in same.values():
        first, *others = sorted(names)
        report.faults += [Fault("duplicate", name, f"byte for byte {first}") for name in others]


def _look_at_archive(report: CheckReport, store: ImageStore) -> None:
    """Name the members of a tar that are refused, and those whose name a later one takes over."""
    if not isinstance(store, TarStore):
        return
    known = {fault.name for fault in report.faults if fault.kind == "refused"}
    report.faults += [Fault("refused", name, why) for name, why in store.refused.items() if name not in known]
    with tarfile.open(store.path, "r:") as archive:
        counted = Counter(clean_name(member.name) for member in archive if member.isreg())
    report.faults += [
        Fault("duplicate", name, f"{count} members of the archive have this name, the last counts")
        for name, count in counted.items()
        if count > 1
    ]


def _measure(report: CheckReport, captions_of: Mapping[str, Sequence[str]], max_words: int) -> None:
    lengths = []
    for key, captions in captions_of.items():
        for caption in captions:
            lengths.append(len(caption.split()))
            if lengths[-1] > max_words:
                report.faults.append(Fault("overlong", key, f"a caption of {lengths[-1]:,} words"))
    report.captions += len(lengths)
    report.caption_words = _lengths([*report.caption_words.get("lengths", ()), *lengths])


def _lengths(lengths: Sequence[int]) -> dict[str, Any]:
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


def _finished(report: CheckReport) -> CheckReport:
    report.faults.sort()
    report.traits = {trait: sorted(names) for trait, names in sorted(report.traits.items())}
    report.caption_words.pop("lengths", None)
    return report
