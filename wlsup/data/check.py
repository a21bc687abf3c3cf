"""``wlsup data check``: every sample read, every fault named, before a run meets them one by one."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wlsup.data.check_report import CheckReport, Fault, count_words, finished
from wlsup.data.evalsets import eval_set_names
from wlsup.data.inspection import DecodedReader, FileReader, PictureReader
from wlsup.data.inspection_pool import inspect_all
from wlsup.data.locate import source_paths
from wlsup.data.picture_files import FileBytes, StoreFiles
from wlsup.data.progress import progress
from wlsup.data.sources import CaptionSource, SourceRequest, load_source, source_names
from wlsup.data.stores import ImageStore, TarStore, clean_name, open_store
from wlsup.data.table import CAPTION_COLUMNS, IMAGE_COLUMNS, resolve_prefix
from wlsup.data.tabular import mend_text, read_table
from wlsup.errors import WlsupError, choose

__all__ = ["check", "check_folder", "check_source", "check_table", "look_at", "measure", "reader_of"]


def check(
    name: str,
    *,
    root: Path,
    captions: str | None = None,
    images: str | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int = 0,
    min_side: int = 16,
    max_words: int = 256,
) -> CheckReport:
    """Check what ``name`` names: "folder", a source of captions, or an eval set.

    Args:
        name: which.
        root: where fetched sets lie, for paths not given.
        captions: as the source takes it.
        images: likewise; of an eval set, its folder.
        options: of the source.
        workers: processes that decode; 0 for none beside this one.
        min_side: in pixels; a picture with a shorter side is tiny.
        max_words: a caption with more words is overlong.

    Raises:
        WlsupError: if the name is unknown, or there is nothing to check.
    """
    if name == "folder":
        if images is None:
            raise WlsupError("check folder needs --images DIR|TAR: the pictures.")
        return check_folder(images, workers=workers, min_side=min_side)
    source, captions, images = source_paths(name, captions, images, root)
    looking = {"workers": workers, "min_side": min_side, "max_words": max_words}
    if source == "table":
        if captions is None:
            raise WlsupError("check table needs --captions FILE: the table. For pictures alone: check folder.")
        return check_table(captions, images, options=options, **looking)
    if source == "shards" and images is None:
        raise WlsupError("check shards needs --images DIR: the folder of tar shards.")
    if images is not None and (source == "shards" or (source == "conceptual_captions" and captions is None)):
        from wlsup.data.check_shards import check_shards

        return check_shards(images, **looking)
    if name in eval_set_names():
        from wlsup.data.check_eval import check_eval_set

        return check_eval_set(name, root=root, images=images, workers=workers, min_side=min_side)
    choose("source of captions or eval set", source, ("folder", *source_names(), *eval_set_names()))
    request = SourceRequest(captions=captions, images=images, max_bad_fraction=1.0)
    return check_source(source, request, options=options, **looking)


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
        workers: as `check`; likewise the others.
        min_side: see there.
        max_words: see there.

    Raises:
        WlsupError: if the table or the store cannot be read at all.
    """
    options = dict(options or {})
    reading = {name: options[name] for name in ("delimiter", "header", "encoding") if name in options}
    table = read_table(captions, **reading)
    image = table.column("--option image_column=...", options.get("image_column"), IMAGE_COLUMNS)
    text = table.column("--option caption_column=...", options.get("caption_column"), CAPTION_COLUMNS)
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
    look_at(report, FileReader(StoreFiles(store, [prefix + key for key in keys]), keys), workers, min_side)
    _look_at_archive(report, store)
    measure(report, captions_of.items(), max_words)
    unlisted = len(set(store.names()).difference(prefix + key for key in keys))
    if unlisted:
        report.notes.append(f"{unlisted:,} pictures in {store.path} are in no row of {table.path.name}")
    return finished(report)


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
        workers: as `check`; likewise the others.
        min_side: see there.
        max_words: see there.
    """
    report = CheckReport(name)
    source = load_source(name, request, options)
    parts = [source] if source.validation is None else [source, source.validation]
    for part in parts:
        for key, why in part.dropped.items():
            report.faults.append(Fault(_kind_of(why), key, why))
        report.notes += part.notes
        look_at(report, reader_of(part), workers, min_side)
        measure(report, zip(part.keys, part.captions, strict=True), max_words)
    return finished(report)


def check_folder(images: str, *, workers: int = 0, min_side: int = 16) -> CheckReport:
    """Check all pictures of a folder, tar or zip, with or without captions; arguments as `check`."""
    store = open_store(images)
    names = store.names()
    if not names:
        raise WlsupError(f"images: there is no picture in {images}. Give a folder or tar that holds some.")
    report = CheckReport("folder")
    look_at(report, FileReader(StoreFiles(store, names), names), workers, min_side)
    _look_at_archive(report, store)
    return finished(report)


def _listed(cell: object) -> Sequence[object]:
    return cell if isinstance(cell, list) else [cell]


def _kind_of(why: str) -> str:
    if why.startswith("no caption"):
        return "captionless"
    return "refused" if why.startswith("refused") else "missing"


def reader_of(source: CaptionSource) -> PictureReader:
    """Return what looks at files where the source has files, and at decoded pictures where it has none."""
    files = FileBytes(source)
    if files.available:
        return FileReader(files, source.keys)
    return DecodedReader(source.pictures, source.keys)


def look_at(report: CheckReport, reader: PictureReader, workers: int, min_side: int) -> None:
    """Inspect pictures and add what is found to ``report``.

    Args:
        report: extended.
        reader: the pictures.
        workers: processes.
        min_side: in pixels.
    """
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
    for names in same.values():  # of pictures with the same bytes, all but the first by name
        first, *others = sorted(names)
        report.faults += [Fault("duplicate", name, f"byte for byte {first}") for name in others]


def _look_at_archive(report: CheckReport, store: ImageStore) -> None:
    """Name the members of an archive that are refused, and of a tar those whose name a later one takes over."""
    known = {fault.name for fault in report.faults if fault.kind == "refused"}
    refused: Mapping[str, str] = getattr(store, "refused", {})
    report.faults += [Fault("refused", name, why) for name, why in refused.items() if name not in known]
    if not isinstance(store, TarStore):
        return
    with tarfile.open(store.path, "r:") as archive:
        counted = Counter(clean_name(member.name) for member in archive if member.isreg())
    report.faults += [
        Fault("duplicate", name, f"{count} members of the archive have this name, the last counts")
        for name, count in counted.items()
        if count > 1
    ]


def measure(report: CheckReport, captions_of: Iterable[tuple[str, Sequence[str]]], max_words: int) -> None:
    """Count words, and add overlong captions to ``report``.

    Args:
        report: extended.
        captions_of: (key, captions) pairs.
        max_words: a caption with more words is overlong.
    """
    lengths = []
    for key, captions in captions_of:
        for caption in captions:
            lengths.append(len(caption.split()))
            if lengths[-1] > max_words:
                report.faults.append(Fault("overlong", key, f"a caption of {lengths[-1]:,} words"))
    report.captions += len(lengths)
    report.caption_words = count_words([*report.caption_words.get("lengths", ()), *lengths])
