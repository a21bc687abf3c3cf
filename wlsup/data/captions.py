"""What all sources that read files do alike: clean a caption, find its picture, say what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from wlsup.data.packed import PackedLists, PackedStrings
from wlsup.data.sources import CaptionSource, StoredPictures
from wlsup.data.stores import ImageStore
from wlsup.data.tabular import mend_text

__all__ = ["clean_caption", "some_of", "stored_source"]


def clean_caption(value: object) -> str:
    """Return the text on one line, single-spaced, undecodable bytes as U+FFFD; "" for what is no text."""
    return " ".join(mend_text(value)[0].split()) if isinstance(value, str) else ""


def some_of(reasons: Mapping[str, str]) -> str:
    """Name the first few of many keys and their reasons."""
    shown: Iterable[str] = (f"{key} ({why})" for key, why in islice(reasons.items(), 3))
    return "; ".join(shown) + ("; ..." if len(reasons) > 3 else "")


def stored_source(
    name: str, records: Mapping[str, Sequence[str]], store: ImageStore, prefix: str, notes: list[str]
) -> CaptionSource:
    """Make a source of captions by key, leaving out and naming the keys without a caption or a picture.

    Args:
        name: of the source.
        records: captions by key.
        store: the pictures.
        prefix: what makes a key the name of its picture in the store.
        notes: of reading so far.
    """
    dropped = {key: "no caption" for key, captions in records.items() if not captions}
    wanted = [prefix + key for key in records if key not in dropped]
    missing = {file[len(prefix) :]: why for file, why in store.problems(wanted).items()}
    if missing:
        notes = [*notes, f"{len(missing):,} pictures that have captions are not to be had: {some_of(missing)}"]
    dropped |= missing
    keys = sorted(key for key in records if key not in dropped)
    return CaptionSource(
        name=name,
        keys=PackedStrings.of(keys),
        captions=PackedLists.of(records[key] for key in keys),
        pictures=StoredPictures(store, PackedStrings.of(prefix + key for key in keys)),
        dropped=dropped,
        notes=notes,
    )
