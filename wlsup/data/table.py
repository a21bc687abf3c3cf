"""Source `table`: a CSV, TSV or JSON-lines file of image names and captions, and a folder or tar of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from wlsup.data.captions import clean_caption, some_of
from wlsup.data.sources import CaptionSource, SourceRequest, StoredPictures, register
from wlsup.data.stores import ImageStore, clean_name, open_store
from wlsup.data.tabular import Table, read_table
from wlsup.errors import WlsupError

__all__ = ["CAPTION_COLUMNS", "IMAGE_COLUMNS", "resolve_prefix", "table_source"]

IMAGE_COLUMNS = ("image", "path", "file", "filename", "filepath", "image_path", "image_name", "file_name")
CAPTION_COLUMNS = ("caption", "text", "title", "sentence", "comment", "captions")
_PROBES = 50


@register("table")
def table_source(
    request: SourceRequest,
    *,
    image_column: str | int | None = None,
    caption_column: str | int | None = None,
    delimiter: str | None = None,
    header: bool = True,
    encoding: str = "utf-8",
    image_prefix: str | None = None,
) -> CaptionSource:
    """Read a table of image names and captions; rows of one image become one record with several captions.

    Rows without a caption are left out and counted. Bytes that are no valid text are read as U+FFFD and counted, and
    are an error only when more than ``max_bad_fraction`` of the rows have them: a few bad rows in a scrape should not
    stop a run, while a table in another encoding must, since it would train on question marks.

    Args:
        request: ``captions`` is the table; ``images`` the folder or tar, by default the table's own folder.
        image_column: name, or position from 0, of the column of image names; None to look for `IMAGE_COLUMNS`.
        caption_column: likewise, of captions, for `CAPTION_COLUMNS`. In JSON lines the field may hold a list.
        delimiter: one character; None to tell by the file's extension and first line.
        header: whether the first line names the columns.
        encoding: of the table.
        image_prefix: what to put before each name to find it; None to find that out from the pictures.

    Raises:
        WlsupError: naming the file, column or line at fault.
    """
    if request.captions is None:
        raise WlsupError("Source 'table' needs captions: the path of a CSV, TSV or JSON-lines file.")
    table = read_table(request.captions, delimiter=delimiter, header=header, encoding=encoding)
    images = table.column("--data.source_options.image_column", image_column, IMAGE_COLUMNS)
    texts = table.column("--data.source_options.caption_column", caption_column, CAPTION_COLUMNS)
    if not table.rows:
        raise WlsupError(f"{table.path} has columns ({', '.join(table.columns)}) but no rows.")
    _check_encoding(table, request.max_bad_fraction, encoding)

    notes = []
    if table.undecodable:
        notes.append(f"{_rows(table.undecodable)} with bytes that are not {encoding}, read as U+FFFD")
    records, empty, nameless = _group(table, images, texts)
    if empty:
        notes.append(f"{_rows(empty)} without a caption left out")
    if nameless:
        notes.append(f"{_rows(nameless)} without an image name left out")

    store = open_store(request.images if request.images is not None else table.path.parent)
    prefix = resolve_prefix(store, list(records)) if image_prefix is None else image_prefix
    dropped = {key: "no caption" for key, captions in records.items() if not captions}
    missing = {key: why for key in records if key not in dropped and (why := store.problem(prefix + key)) is not None}
    if missing:
        notes.append(f"{len(missing)} images listed in {table.path.name} but not to be had: {some_of(missing)}")
    dropped |= missing
    keys = sorted(key for key in records if key not in dropped)
    return CaptionSource(
        name="table",
        keys=keys,
        captions=[records[key] for key in keys],
        pictures=StoredPictures(store, [prefix + key for key in keys]),
        dropped=dropped,
        notes=notes,
    )


def resolve_prefix(store: ImageStore, names: Sequence[str]) -> str:
    """Find what to put before a table's names so that the store knows them: ``Images/`` for Flickr8k's archive.

    Args:
        store: the pictures.
        names: the table's.

    Returns:
        "" if any of the first names is found as it is, or none is found anywhere; else the folder they all lie in.
    """
    probes = list(islice(names, _PROBES))
    if any(store.exists(name) for name in probes):
        return ""
    stored = store.names()
    for probe in probes:
        found = [name for name in stored if name.endswith("/" + probe)]
        if len(found) == 1:
            return found[0].removesuffix(probe)
    return ""


def _group(table: Table, images: int, texts: int) -> tuple[dict[str, list[str]], list[int], list[int]]:
    """Return captions by image, and the line numbers of rows without a caption and without an image name."""
    records: dict[str, list[str]] = {}
    empty: list[int] = []
    nameless: list[int] = []
    for row in table.rows:
        name = row.values[images]
        if not isinstance(name, str) or not name.strip():
            nameless.append(row.line)
            continue
        captions = records.setdefault(clean_name(name), [])
        cell = row.values[texts]
        found = [text for value in (cell if isinstance(cell, list) else [cell]) if (text := clean_caption(value))]
        captions += found
        if not found:
            empty.append(row.line)
    return records, empty, nameless


def _check_encoding(table: Table, max_bad_fraction: float, encoding: str) -> None:
    bad = table.undecodable
    if len(bad) > max_bad_fraction * len(table.rows):
        raise WlsupError(
            f"{table.path} is not {encoding}: {len(bad)} of {len(table.rows)} rows have bytes that are not, the first "
            f"in line {bad[0]}. Set --data.source_options.encoding (latin-1, cp1252 are common), or convert the file."
        )


def _rows(lines: list[int]) -> str:
    """Say how many rows, and where the first are."""
    listed = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
    return f"{len(lines)} rows (lines {listed})" if len(lines) > 1 else f"1 row (line {listed})"
