"""The ledger of a download by links: what became of every row, kept in a file that survives a kill.

SQLite, with its rollback journal (write-ahead logging needs shared memory, which network file systems do not have):
a million rows are counted by a query, and a process that dies in the middle of a write leaves the last whole state.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from wlsup.errors import WlsupError

__all__ = ["FAILURES", "Ledger", "Link", "Outcome", "link_name"]

FAILURES = (
    "dead",
    "refused",
    "unreachable",
    "timeout",
    "throttled",
    "server-error",
    "broken",
    "not-an-image",
    "too-small",
    "too-large",
)
"""Outcomes of a link that gave no picture; beside these there are "ok", "pending" and, of a row, "bad-row"."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS links(
    name TEXT PRIMARY KEY, url TEXT NOT NULL, line INTEGER, outcome TEXT NOT NULL DEFAULT 'pending',
    attempts INTEGER NOT NULL DEFAULT 0, bytes INTEGER, sha256 TEXT, width INTEGER, height INTEGER, detail TEXT,
    time REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS pending ON links(line) WHERE outcome = 'pending';
CREATE TABLE IF NOT EXISTS rows(line INTEGER PRIMARY KEY, name TEXT, problem TEXT);
CREATE TABLE IF NOT EXISTS facts(name TEXT PRIMARY KEY, value TEXT);
"""
_ALL = 1 << 62
_BATCH = 200_000
"""Rows taken in at once, sorted by name: in the file's order each would fall on another page of the table."""

_CACHE = 256 << 10  # kB of the tables kept in memory: rows are looked up by name, which is in no order of the file's


@dataclass(frozen=True)
class Link:
    """One address to fetch.

    Args:
        name: its picture's file name, as `link_name` makes it.
        url: the address.
        attempts: how often it was tried before.
    """

    name: str
    url: str
    attempts: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a link.

    Args:
        link: which.
        outcome: "ok" or one of `FAILURES`.
        attempts: requests made this time.
        size: bytes of the picture.
        sha256: of the picture's file.
        width: of the picture, in pixels.
        height: likewise.
        detail: one line on a failure.
    """

    link: Link
    outcome: str
    attempts: int = 0
    size: int | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    detail: str = ""


def link_name(url: str) -> str:
    """Return the file name of the picture at ``url``, as the source `conceptual_captions` looks for it."""
    from wlsup.data.conceptual_captions import cc3m_image_name

    return cc3m_image_name(url)


class Ledger:
    """The outcome of every row of a TSV of captions and links.

    Links are kept for good, by their picture's name; rows are those of the TSV given last. A link that several rows
    name is fetched once.

    Args:
        path: the file; made if it is not there.

    Raises:
        WlsupError: if the file is something else, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._base = sqlite3.connect(path, timeout=2.0, isolation_level=None)
            self._base.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._base.execute(f"PRAGMA cache_size = -{_CACHE}")
            self._base.executescript(_SCHEMA)
            self._base.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise WlsupError(
                f"The ledger {path} cannot be opened ({error}). If another download is writing to it, wait for it."
            ) from error
        except sqlite3.DatabaseError as error:
            raise WlsupError(
                f"{path} is no ledger ({error}). Move it away; pictures that are there are kept."
            ) from error

    def close(self) -> None:
        """Write what is not written yet, and close."""
        self.commit(final=True)
        self._base.close()

    def commit(self, final: bool = False) -> None:
        """Make what was recorded survive a kill."""
        self._base.execute("COMMIT")
        if not final:
            self._base.execute("BEGIN IMMEDIATE")

    def load_rows(self, tsv: Path) -> int:
        """Take in a TSV of ``caption<TAB>url`` rows; return their number. The same file again costs its reading only.

        Raises:
            WlsupError: if the file is missing or empty.
        """
        try:
            with open(tsv, "rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise WlsupError(f"--tsv {tsv}: {error.strerror}. Give the published TSV of captions and links.") from error
        known = self._base.execute("SELECT value FROM facts WHERE name = 'tsv'").fetchone()
        if known is None or known[0] != digest.hexdigest():
            self._base.execute("DELETE FROM facts")  # so that a reading that breaks off is begun again
            self._base.execute("DELETE FROM rows")
            self._base.execute("UPDATE links SET line = NULL")
            with open(tsv, encoding="utf-8", errors="replace", newline="\n") as lines:
                numbered = enumerate(lines, start=1)
                while batch := list(islice(numbered, _BATCH)):
                    self._register(batch)
            self._base.execute("INSERT OR REPLACE INTO facts VALUES ('tsv', ?)", (digest.hexdigest(),))
            self.commit()
        number = self._base.execute("SELECT COUNT(*) FROM rows").fetchone()[0]
        if not number:
            raise WlsupError(f"--tsv {tsv} is empty. Each line must be a caption, a tab, and an address.")
        return number

    def _register(self, batch: Iterable[tuple[int, str]]) -> None:
        """Write down numbered lines, and the links that they name."""
        rows: list[tuple[int, str | None, str | None]] = []
        links: list[tuple[str, int, str]] = []
        for number, line in batch:
            caption, tab, url = line.rstrip("\r\n").rpartition("\t")
            url = url.strip()
            if not line.strip() or (number == 1 and url.casefold() in {"url", "image_url"}):
                continue
            if not tab or not caption.strip() or not url.lower().startswith(("http://", "https://")):
                rows.append((number, None, "bad-row"))
                continue
            name = link_name(url)
            rows.append((number, name, None))
            links.append((name, number, url))
        self._base.executemany(
            "INSERT INTO links(name, line, url) VALUES (?, ?, ?) "
            "ON CONFLICT(name) DO UPDATE SET line = COALESCE(line, excluded.line)",
            sorted(links),
        )
        self._base.executemany("INSERT INTO rows VALUES (?, ?, ?)", rows)

    def reopen(self, outcomes: Iterable[str]) -> int:
        """Set links of these outcomes back to pending, to be tried again; return their number."""
        return sum(
            self._base.execute("UPDATE links SET outcome = 'pending' WHERE outcome = ?", (outcome,)).rowcount
            for outcome in outcomes
        )

    def pending(self, limit: int | None = None) -> Iterator[Link]:
        """Yield the links not decided yet, in the rows' order, each once; of the first ``limit`` rows, if given."""
        last = 0
        while found := self._base.execute(
            "SELECT line, name, url, attempts FROM links WHERE outcome = 'pending' AND line > ? AND line <= ? "
            "ORDER BY line LIMIT 2000",
            (last, limit or _ALL),
        ).fetchall():
            for last, name, url, attempts in found:  # noqa: B007  (used by the next query)
                yield Link(name, url, attempts)

    def count_pending(self, limit: int | None = None) -> int:
        """Return the number of links that `pending` would yield."""
        query = "SELECT COUNT(*) FROM links WHERE outcome = 'pending' AND line <= ?"
        return self._base.execute(query, (limit or _ALL,)).fetchone()[0]

    def ever_answered(self) -> bool:
        """Say whether any link ever led anywhere, so that there has been a network."""
        query = "SELECT EXISTS (SELECT 1 FROM links WHERE outcome NOT IN ('pending', 'unreachable'))"
        return bool(self._base.execute(query).fetchone()[0])

    def record(self, outcome: Outcome) -> None:
        """Write down what became of a link."""
        self._base.execute(
            "UPDATE links SET outcome = ?, attempts = attempts + ?, bytes = ?, sha256 = ?, width = ?, height = ?, "
            "detail = ?, time = ? WHERE name = ?",
            (
                outcome.outcome,
                outcome.attempts,
                outcome.size,
                outcome.sha256,
                outcome.width,
                outcome.height,
                outcome.detail or None,
                time.time(),
                outcome.link.name,
            ),
        )

    def account(self, limit: int | None = None) -> dict[str, object]:
        """Count rows by outcome.

        Returns:
            ``rows``, ``links`` (distinct), ``outcomes`` {outcome: rows}, ``reasons`` {outcome: {detail: links}} with
            the five most frequent each, ``bytes``, ``attempts``, ``repeated_pictures`` (links beyond the first whose
            picture is byte for byte that of another link: a host's placeholder, as a rule), and ``hosts``, the ten
            with most failures.
        """
        end = (limit or _ALL,)
        ask = self._base.execute
        chosen = "FROM links WHERE line <= ?"
        outcomes = dict(
            ask(
                "SELECT COALESCE(problem, outcome) AS what, COUNT(*) FROM rows LEFT JOIN links USING(name) "
                "WHERE rows.line <= ? GROUP BY what ORDER BY COUNT(*) DESC",
                end,
            )
        )
        reasons: dict[str, dict[str, int]] = {}
        for outcome, detail, count in ask(
            f"SELECT outcome, detail, COUNT(*) AS n {chosen} AND detail IS NOT NULL GROUP BY outcome, detail "
            "ORDER BY n DESC",
            end,
        ):
            listed = reasons.setdefault(outcome, {})
            if len(listed) < 5:
                listed[detail] = count
        links, size, attempts = ask(
            f"SELECT COUNT(*), COALESCE(SUM(bytes), 0), COALESCE(SUM(attempts), 0) {chosen}", end
        ).fetchone()
        repeated = ask(
            f"SELECT COALESCE(SUM(n - 1), 0) FROM (SELECT COUNT(*) AS n {chosen} AND outcome = 'ok' GROUP BY sha256)",
            end,
        ).fetchone()[0]
        hosts: dict[str, int] = {}
        for (url,) in ask(f"SELECT url {chosen} AND outcome NOT IN ('ok', 'pending')", end):
            host = url.split("/", 3)[2]
            hosts[host] = hosts.get(host, 0) + 1
        return {
            "rows": sum(outcomes.values()),
            "links": links,
            "outcomes": outcomes,
            "reasons": reasons,
            "bytes": size,
            "attempts": attempts,
            "repeated_pictures": repeated,
            "hosts": dict(sorted(hosts.items(), key=lambda item: -item[1])[:10]),
        }

    def outcomes(self) -> Iterator[dict[str, object]]:
        """Yield every row: line, name, url, outcome, attempts, bytes, sha256, width, height, detail."""
        cursor = self._base.execute(
            "SELECT rows.line AS line, rows.name AS name, url, COALESCE(problem, outcome) AS outcome, attempts, bytes, "
            "sha256, width, height, detail FROM rows LEFT JOIN links USING(name) ORDER BY rows.line"
        )
        names = [column[0] for column in cursor.description]
        for row in cursor:
            yield dict(zip(names, row, strict=True))
