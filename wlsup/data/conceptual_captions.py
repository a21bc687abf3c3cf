"""Source `conceptual_captions`: CC-3M's published TSV and a folder of fetched pictures, or img2dataset's tar shards.

Source: Sharma et al. 2018. The TSV has a caption and a URL a line, and no names: a picture is known by its URL alone.
Its key and file name are `cc3m_image_name`, so that the same subset is chosen on every machine, whichever links have
died, from a folder and from shards alike.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wlsup.data.captions import clean_caption
from wlsup.data.packed import PackedLists, PackedStrings, StringPacker
from wlsup.data.sources import CaptionSource, SourceRequest, StoredPictures, register
from wlsup.data.stores import ImageStore, open_store
from wlsup.data.tabular import mend_text
from wlsup.errors import WlsupError

__all__ = ["cc3m_image_name", "conceptual_captions_source", "read_tsv"]

_NAME = re.compile(r"((?:.*/)?)([0-9a-f]{2})/(\2[0-9a-f]{22})\.jpg")
_DIGITS = 24  # of a URL's SHA-256


def cc3m_image_name(url: str) -> str:
    """Return the file name of the picture behind ``url``, below the folder of pictures, which is also its key.

    It is the first 24 hexadecimal digits of the URL's SHA-256 and ``.jpg``, in a folder of the first two digits:
    ``3f/3fa0....jpg``. The ending is always the same, whatever the format: readers look at the content.
    """
    return _name(_digits(url))


@register("conceptual_captions")
def conceptual_captions_source(request: SourceRequest) -> CaptionSource:
    """Read CC-3M. Rows whose picture nobody has, about a fifth by now, are left out and counted in a note.

    Args:
        request: with ``captions`` (the TSV), ``images`` is the folder, tar or zip of pictures that `wlsup data fetch`
            filled; without, ``images`` is a folder of tar shards, or one of them (see the source `shards`).

    Raises:
        WlsupError: if a file is missing, the TSV is no such file, or not one of its pictures is there.
    """
    if request.images is None:
        raise WlsupError(
            "Source 'conceptual_captions' needs images: the folder of fetched pictures, together with captions (the "
            "published TSV of caption and URL), or a folder of tar shards. `wlsup data fetch cc3m` makes the first."
        )
    if request.captions is None:
        from wlsup.data.shards_source import read_shards  # on use: not needed with a TSV

        return read_shards(request, "conceptual_captions")
    texts, digests, malformed, undecodable = read_tsv(request.captions)
    if malformed > request.max_bad_fraction * (malformed + len(texts)):
        raise WlsupError(
            f"{request.captions}: {malformed:,} of {malformed + len(texts):,} lines are not `caption<TAB>URL`. Give "
            "the TSV as published (Train_GCC-training.tsv); for other tables set source to 'table'."
        )
    store = open_store(request.images)
    present, prefix = _present(store)
    # Rows in the order of their keys, those of one picture side by side and in file order.
    rows = np.flatnonzero(np.isin(digests, present))
    rows = rows[np.argsort(digests[rows], kind="stable")]
    if not len(rows):
        first = _name(digests[0].decode()) if len(digests) else "-"
        raise WlsupError(
            f"Of {len(texts):,} rows of {request.captions} not one has its picture in {store.path}. Pictures are named "
            f"by their URL's hash (the first row's: {first}); fetch them with `wlsup data fetch cc3m --tsv FILE`."
        )
    starts = np.flatnonzero(np.concatenate([[True], digests[rows][1:] != digests[rows][:-1]]))
    keys = PackedStrings.of(_name(digests[row].decode()) for row in rows[starts])
    notes = []
    if len(texts) - len(rows):
        notes.append(
            f"{len(texts) - len(rows):,} of {len(texts):,} rows have no picture (a dead link, or not fetched yet)"
        )
    if malformed:
        notes.append(f"{malformed:,} lines that are not `caption<TAB>URL`, or have no caption, left out")
    if undecodable:
        notes.append(f"{undecodable:,} captions with bytes that are not utf-8, read as U+FFFD")
    return CaptionSource(
        name="conceptual_captions",
        keys=keys,
        captions=PackedLists(texts.take(rows), np.append(starts, len(rows))),
        pictures=StoredPictures(store, PackedStrings.of(prefix + key for key in keys) if prefix else keys),
        notes=notes,
    )


def read_tsv(path: str | Path) -> tuple[PackedStrings, np.ndarray, int, int]:
    """Read the published TSV line by line: about 90 bytes of memory a row.

    Args:
        path: the file.

    Returns:
        The captions; the heads of their URLs' SHA-256, (n,) of 24 hexadecimal digits each; the number of lines that
        are no row or have no caption, and of captions with undecodable bytes.

    Raises:
        WlsupError: if the file is missing.
    """
    texts, digests = StringPacker(), bytearray()
    malformed = undecodable = 0
    for line in _lines(Path(path).expanduser()):
        caption, _, url = line.rpartition(b"\t")
        caption, mended = mend_text(caption.decode("utf-8", "surrogateescape"))
        caption, url = clean_caption(caption), url.strip()
        if not caption or not url:
            malformed += 1
            continue
        undecodable += mended
        texts.append(caption)
        digests += _digits(url.decode("utf-8", "surrogateescape")).encode()
    return texts.packed(), np.frombuffer(digests, f"S{_DIGITS}"), malformed, undecodable


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    yield line.rstrip(b"\r\n")
    except OSError as error:
        raise WlsupError(f"captions: {path} cannot be read ({error.strerror}). Give the TSV as published.") from None


def _digits(url: str) -> str:
    return hashlib.sha256(url.strip().encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


def _name(digits: str) -> str:
    return f"{digits[:2]}/{digits}.jpg"


def _present(store: ImageStore) -> tuple[np.ndarray, str]:
    """Return the digests of the pictures that are there, and the folder, if any, that their folders lie in."""
    digests, prefix = bytearray(), None
    for name in store.names():
        match = _NAME.fullmatch(name)
        if match and prefix in (None, match[1]):
            prefix = match[1]
            digests += match[3].encode()
    return np.frombuffer(digests, f"S{_DIGITS}"), prefix or ""
