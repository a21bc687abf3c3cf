"""How ``wlsup data`` speaks to people: tables, and names out of files made fit for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wlsup.data.check_report import FAULTS, CheckReport
from wlsup.data.locate import Status
from wlsup.data.progress import human_bytes

__all__ = ["SHOWN", "plain", "show_account", "show_check", "show_list"]

SHOWN = 20
"""Names listed of a kind; JSON has them all."""


def plain(text: object) -> str:
    """Make text out of a file fit for a terminal: no control characters, no undecodable names."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text))


def _cell(text: object) -> str:
    """Make text out of a file fit for a table, where brackets would be markup."""
    return escape(plain(text))


def show_list(root: Path, found: Sequence[Status]) -> None:
    """Print what there is of each data set."""
    table = Table(title=f"Data sets in {root}", title_justify="left")
    table.add_column("name", no_wrap=True)
    for column in ("domain", "state", "download", "what there is, or the first that is missing"):
        table.add_column(column, justify="right" if column == "download" else "left", overflow="fold")
    for status in found:
        entry = status.entry
        size = human_bytes(entry.download_bytes) if entry.download_bytes else ("?" if entry.files else "by hand")
        more = f" and {len(status.missing) - 1} more" if len(status.missing) > 1 else ""
        note = f"no {status.missing[0]}{more}" if status.missing else "; ".join(entry.layout)
        table.add_row(entry.name, entry.domain or "-", status.state, size, note)
    Console().print(table)
    print("Get one: wlsup data fetch NAME. Already have it? Copy or link it so that the missing paths are there.")


def show_account(account: dict[str, Any]) -> None:
    """Print the outcomes of a download by links."""
    table = Table(title=f"{account['rows']:,} rows of {account['tsv']}", title_justify="left")
    table.add_column("outcome")
    table.add_column("rows", justify="right")
    table.add_column("%", justify="right")
    table.add_column("most often", overflow="fold")
    for outcome, rows in account["outcomes"].items():
        reasons = "; ".join(f"{detail} ({count:,})" for detail, count in account["reasons"].get(outcome, {}).items())
        table.add_row(outcome, f"{rows:,}", f"{100 * rows / max(account['rows'], 1):.1f}", _cell(reasons))
    Console().print(table)
    print(f"{human_bytes(account['bytes'])} in {account['images']}; {account['attempts']:,} requests.")
    if account["repeated_pictures"]:
        print(f"{account['repeated_pictures']:,} pictures are byte for byte another link's: placeholders, as a rule.")


def show_check(report: CheckReport) -> None:
    """Print what a check found, each kind's first names, and the captions' lengths."""
    console = Console()
    if report.faults:
        counts = report.counts
        table = Table(title=f"{len(report.faults):,} faults in {report.source}", title_justify="left")
        for column in ("fault", "count", "which", "detail"):
            table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
        for kind, count in counts.items():
            listed = [fault for fault in report.faults if fault.kind == kind]
            for position, fault in enumerate(listed[:SHOWN]):
                head = (kind, f"{count:,}") if position == 0 else ("", "")
                table.add_row(*head, _cell(fault.name), _cell(fault.detail))
            if count > SHOWN:
                table.add_row("", "", f"... and {count - SHOWN:,} more", "all of them: --json")
        console.print(table)
        for kind in counts:
            console.print(f"{kind}: {FAULTS[kind]}", highlight=False)
    else:
        print(f"No fault in {report.source}.")
    print(f"{report.pictures:,} pictures, {report.captions:,} captions.")
    for trait, names in report.traits.items():
        print(f"  {trait}: {len(names):,} (read correctly), such as {plain(names[0])}")
    words = report.caption_words
    if words:
        print(f"Words a caption: {words['min']} to {words['max']}, median {words['median']:g}, mean {words['mean']:g}")
        most = max(words["histogram"].values())
        for bin_name, count in words["histogram"].items():
            print(f"  {bin_name:>7} {count:>9,} {'#' * round(40 * count / max(most, 1))}")
    for note in report.notes:
        print(plain(note))
