"""Rows of a CSV, TSV or JSON-lines file as people publish them: quotes, encodings and headers included."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wlsup.errors import WlsupError

__all__ = ["Row", "Table", "mend_text", "read_table"]

_JSON_SUFFIXES = {".jsonl", ".ndjson"}
_MAX_LINES_OF_A_ROW = 100
_SURROGATE = re.compile("[\ud800-\udfff]")
csv.field_size_limit(1 << 24)  # the default of 131,072 characters refuses a 20,000-word caption


@dataclass(slots=True)
class Row:
    """One row.

    Args:
        line: number of its first line in the file, from 1.
        values: one a column; a JSON field keeps its own type; None where the row is too short.
    """

    line: int
    values: list[Any]


@dataclass
class Table:
    """A table's columns and rows.

    Args:
        path: of the file.
        columns: names, in order; "0", "1", ... where the file has no header.
        rows: in file order.
        undecodable: line numbers of rows with bytes that are not valid in the encoding; each such byte was read as
            U+FFFD.
    """

    path: Path
    columns: list[str]
    rows: list[Row] = field(default_factory=list)
    undecodable: list[int] = field(default_factory=list)

    def column(self, option: str, given: str | int | None, accepted: Sequence[str]) -> int:
        """Find a column.

        Args:
            option: the setting that names the column, as messages show it.
            given: the user's choice, a name or a position from 0; None to look for one of ``accepted``.
            accepted: names looked for, in order, in any case.

        Raises:
            WlsupError: if there is none; the message lists the columns found.
        """
        folded = [name.casefold() for name in self.columns]
        wanted = accepted if given is None else [str(given)]
        for name in wanted:
            if name.casefold() in folded:
                return folded.index(name.casefold())
        if given is not None and str(given).isdigit() and int(given) < len(self.columns):
            return int(given)
        found = ", ".join(repr(name) for name in self.columns)
        if given is not None:
            raise WlsupError(f"{self.path} has no column {given!r}. Found: {found}. Set {option} to one of these.")
        raise WlsupError(
            f"{self.path} has none of the columns {', '.join(accepted)}. Found: {found}. Set {option} to the right "
            "one, or, if the first line is data and not names, set header: false and give the column's position from 0."
        )


def read_table(
    path: str | Path, *, delimiter: str | None = None, header: bool = True, encoding: str = "utf-8"
) -> Table:
    """Read a table of text.

    ``.jsonl`` and ``.ndjson`` hold one JSON object a line; any other file is delimited text. In comma-separated files
    quotes group (RFC 4180); in tab-separated ones, published raw as often as not, a quote is an ordinary character
    unless it wraps a whole field. Fields beyond the last column are taken for an unquoted delimiter in that column.

    Args:
        path: the file.
        delimiter: one character; None for tab in ``.tsv`` files, comma in ``.csv`` files, and otherwise whichever of
            tab, comma, semicolon or bar the first line has most of.
        header: whether the first line names the columns.
        encoding: of the text. A byte-order mark is honoured.

    Raises:
        WlsupError: if the file is missing, empty, of an unknown encoding, or its structure is broken (line named).
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise WlsupError(f"{path} is a folder. Give the CSV, TSV or JSON-lines file itself.")
    try:
        with open(path, "rb") as file:
            mark = file.read(4)
        with open(path, encoding=_encoding(mark, encoding), errors="surrogateescape", newline="") as file:
            if path.suffix.lower() in _JSON_SUFFIXES:
                return _read_json_lines(path, file)
            return _read_delimited(path, file, delimiter, header)
    except FileNotFoundError:
        raise WlsupError(f"No such file: {path}. Looked in {Path.cwd()}; give a path that exists.") from None
    except OSError as error:
        raise WlsupError(f"{path} cannot be read: {error.strerror}. Check the file and its permissions.") from error
    except LookupError:
        raise WlsupError(f"encoding={encoding!r} is unknown. Use one of Python's: utf-8, latin-1, cp1252...") from None
    except UnicodeError as error:  # only codecs that honour no error handler, such as utf-16 cut in half, come here
        raise WlsupError(f"{path} is not {encoding} text ({error}). Set encoding to the right one.") from error


def _encoding(mark: bytes, asked: str) -> str:
    if mark.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return "utf-8-sig" if asked.lower().replace("_", "-") in {"utf-8", "utf8"} else asked


def mend_text(text: str) -> tuple[str, bool]:
    """Replace undecodable bytes and lone surrogates, which tokenizers choke on, by U+FFFD; say whether any was there.

    Args:
        text: as decoded with ``surrogateescape``, or out of a JSON string with half an escaped pair.
    """
    if text.isascii():
        return text, False
    mended, count = _SURROGATE.subn("\ufffd", text)
    return mended, count > 0


def _read_json_lines(path: Path, file: Iterable[str]) -> Table:
    table = Table(path, [])
    positions: dict[str, int] = {}
    for line, raw in enumerate(file, start=1):
        text, replaced = mend_text(raw)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise WlsupError(f"{path}, line {line}: not JSON ({error}). Each line must be one JSON object.") from None
        if not isinstance(record, dict):
            raise WlsupError(f"{path}, line {line}: a JSON {type(record).__name__}, not an object like {{...}}.")
        for name in record:
            positions.setdefault(name, len(positions))
        values: list[Any] = [None] * len(positions)
        for name, value in record.items():
            values[positions[name]] = value
        table.rows.append(Row(line, values))
        if replaced:
            table.undecodable.append(line)
    if not table.rows:
        raise WlsupError(f"{path} is empty. It must hold one JSON object a line.")
    table.columns = list(positions)
    for row in table.rows:
        row.values += [None] * (len(positions) - len(row.values))
    return table


def _read_delimited(path: Path, file: Iterable[str], delimiter: str | None, header: bool) -> Table:
    lines = iter(file)
    first = next(lines, "")
    if not first.strip():
        raise WlsupError(f"{path} is empty, or its first line is. It must begin with its columns' names or with data.")
    delimiter = _delimiter(path, first, delimiter)
    rows = _rows(path, itertools.chain([first], lines), delimiter)
    line, fields, bad = next(rows)
    if header:
        table = Table(path, [_clean(name, delimiter) for name in fields])
    else:
        table = Table(path, [str(position) for position in range(len(fields))])
        rows = itertools.chain([(line, fields, bad)], rows)
    width = len(table.columns)
    for line, fields, bad in rows:
        if len(fields) > width:
            fields[width - 1 :] = [delimiter.join(fields[width - 1 :])]
        fields = [_clean(value, delimiter) for value in fields]
        if not any(fields):
            continue
        table.rows.append(Row(line, [*fields, *[None] * (width - len(fields))]))
        if bad:
            table.undecodable.append(line)
    return table


def _delimiter(path: Path, first: str, asked: str | None) -> str:
    if asked is not None:
        if len(asked) != 1:
            raise WlsupError(f"delimiter={asked!r}: give exactly one character, such as ',' or a tab.")
        return asked
    known = {".csv": ",", ".tsv": "\t", ".tab": "\t"}.get(path.suffix.lower())
    if known is not None and known in first:
        return known
    return max("\t,;|", key=first.count)  # the first of equals; a table of one column has none, and any will do


def _rows(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str], bool]]:
    """Yield (line number, fields, whether bytes were replaced) for each row."""
    bad = False
    raw: list[str] = []

    def mended() -> Iterator[str]:
        nonlocal bad
        for line in lines:
            text, replaced = mend_text(line.replace("\0", ""))
            bad |= replaced
            raw.append(text)
            yield text

    quoted = delimiter != "\t"
    reader = csv.reader(mended(), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    start = 1
    try:
        for fields in reader:
            runaway = len(raw) > _MAX_LINES_OF_A_ROW
            # A quote that never closes swallows the rest of the file: then the row's quotes do not pair up.
            if quoted and len(raw) > 1 and (runaway or "".join(raw).count('"') % 2):
                raise WlsupError(
                    f"{path}, line {start}: a field begins with a quote that does not close in its line, and takes in "
                    f"the next {len(raw) - 1} lines. Close it, double it, or remove it."
                )
            yield start, fields, bad
            start, bad = reader.line_num + 1, False
            raw.clear()
    except csv.Error as error:
        raise WlsupError(f"{path}, line {start}: {error}. Check the quotes and the delimiter there.") from error


def _clean(value: str, delimiter: str) -> str:
    """Strip a field, and the quotes round it that the csv module leaves.

    It leaves them after a space (``a.jpg, "two dogs, running"``), and in tab-separated text, where some writers put
    them round a field that holds quotes.
    """
    stripped = value.strip()
    wrapped = len(stripped) > 1 and stripped[0] == stripped[-1] == '"' and (delimiter == "\t" or value[0].isspace())
    if not wrapped or '"' in stripped[1:-1].replace('""', ""):
        return stripped
    return stripped[1:-1].replace('""', '"')
