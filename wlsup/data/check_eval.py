"""Checking a labelled set: its files, its number of samples, its labels, and pictures that train and test share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wlsup.batch import ImageSpec
from wlsup.data.catalog import CATALOG
from wlsup.data.check import look_at
from wlsup.data.check_report import CheckReport, Fault, finished
from wlsup.data.download import file_matches
from wlsup.data.evalsets import EvalSetSpec, LabelledPictures, build_eval_set
from wlsup.data.inspection import DecodedReader, FileReader, PictureReader
from wlsup.data.locate import entry_status
from wlsup.data.picture_files import StoreFiles
from wlsup.data.sources import MemoryPictures
from wlsup.errors import WlsupError

__all__ = ["check_eval_set"]

# What the pictures would be resized to: not used, since they are looked at before that.
_SPEC = ImageSpec(size=32, resize=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def check_eval_set(
    name: str, *, root: Path, images: str | None = None, workers: int = 0, min_side: int = 16
) -> CheckReport:
    """Check a published or generated eval set.

    Byte-identical pictures are a note here and no fault: published sets hold some, and are used as they are.

    Args:
        name: of the set.
        root: where fetched sets lie.
        images: the set's own folder, if it lies elsewhere.
        workers: processes that decode; 0 for none beside this one.
        min_side: in pixels; a picture with a shorter side is tiny.

    Raises:
        WlsupError: if the set is not there.
    """
    report = CheckReport(name)
    entry = CATALOG.get(name)
    folder = root / name if images is None else Path(images)
    for remote in entry.files if entry is not None else ():
        path = folder / remote.name
        if not remote.is_archive and path.is_file() and (why := file_matches(remote, path)) is not None:
            report.faults.append(Fault("corrupt", remote.name, f"not the published file: {why}"))
    chosen = name if entry is None else EvalSetSpec(name, images=images, max_bad_fraction=0.999)
    try:
        eval_set = build_eval_set(chosen, _SPEC, str(root))
    except WlsupError as error:
        if entry is None or images is not None or entry_status(entry, root).missing:
            raise
        # All its files are there, so one of them is damaged: that is what a check is to find.
        report.faults.append(Fault("corrupt", name, str(error)))
        return finished(report)
    numbers = {}
    # A set whose bank is another's is its test pictures; the bank is checked under its own name.
    borrowed = entry is not None and set(entry.samples) == {"test"}
    parts = {"train": eval_set.train, "test": eval_set.test}
    for split, part in parts.items():
        if borrowed and split == "train":
            continue
        look_at(report, _reader(split, part), workers, min_side)
        numbers[split] = len(part)
        classes = {int(label) for label in part.labels}
        lacking = [label for index, label in enumerate(eval_set.class_names) if index not in classes]
        if lacking:
            report.faults.append(Fault("count", split, f"{len(lacking)} classes have no picture, such as {lacking[0]}"))
    expected = sum(entry.samples.values()) if entry is not None else 0
    if expected and sum(numbers.values()) != expected:
        report.faults.append(Fault("count", name, f"{sum(numbers.values()):,} samples, not {expected:,} as published"))
    same = [fault for fault in report.faults if fault.kind == "duplicate"]
    report.faults = [fault for fault in report.faults if fault.kind != "duplicate"]
    if same:
        report.notes.append(f"{len(same):,} pictures are byte for byte another one, such as {same[0].name}")
    return finished(report)


def _reader(split: str, part: Any) -> PictureReader:
    if isinstance(part, LabelledPictures):
        return FileReader(StoreFiles(part.store, part.names), _keys(split, part.names))
    return DecodedReader(MemoryPictures(part.pictures), _keys(split, range(len(part))))


def _keys(split: str, names: Sequence[object]) -> list[str]:
    return [f"{split}/{name}" for name in names]
