"""The k-NN part of results.json as a person reads it: in a terminal, in plain text, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wlsup.evaluation.statistics import Interval, mean_of_intervals, wilson

__all__ = ["knn_markdown", "knn_table", "knn_text", "percent", "points", "print_knn_table"]

_HEADERS = ("set", "domain", "k", "pretrained", "fine-tuned", "change", "95% interval", "")
_RIGHT = (False, False, True, True, True, True, True, False)
_STYLES = {"gain": "green", "loss": "red", "unsure": "dim", "unchanged": "dim", "": ""}
_Verdict = Literal["gain", "loss", "unsure", "unchanged", ""]
_NOTE = (
    "Top-1 accuracy in % +- half of Wilson's 95% interval, change in points. Gain or\n"
    "loss: the change's 95% interval (paired bootstrap over test pictures; of means\n"
    "made of the sets' own) excludes 0. All of it is about this seed."
)


@dataclass(frozen=True)
class _Row:
    cells: tuple[str, ...]
    verdict: _Verdict
    mean: bool = False


def knn_table(results: Mapping[str, Any]) -> Table:
    """Return results.json's k-NN part as a rich table: green for gains, red for losses, dim for what may be noise.

    Args:
        results: what results.json holds.
    """
    rows = _rows(results)
    table = Table(
        title=_title(results),
        caption=_note(results),
        title_justify="left",
        caption_justify="left",
        box=None,  # with rules between the columns it would not fit 80 of them
        padding=(0, 2, 0, 0),
        pad_edge=False,
        # Its own: in a terminal too narrow for it lines wrap, where rich would cut numbers short.
        width=sum(_widths(rows)) + 2 * (len(_HEADERS) - 1),
    )
    for header, right in zip(_HEADERS, _RIGHT, strict=True):
        table.add_column(header, justify="right" if right else "left", no_wrap=True)
    for position, row in enumerate(rows):
        if row.mean and not rows[position - 1].mean:
            table.add_row()
        style = _STYLES[row.verdict]
        # Accuracies are facts and stay plain; only what the change says is coloured.
        table.add_row(*(Text(cell, style if column >= 5 else "") for column, cell in enumerate(row.cells)))
    return table


def knn_text(results: Mapping[str, Any]) -> str:
    """Return the same as plain ASCII text, for a pipe or a log file: the last column says what colour would.

    Args:
        results: what results.json holds.
    """
    rows = _rows(results)
    lines, widths = [_HEADERS, *(row.cells for row in rows)], _widths(rows)
    text = [_title(results)]
    for position, cells in enumerate(lines):
        if position == 1 or (position > 1 and rows[position - 1].mean and not rows[position - 2].mean):
            text.append("  ".join("-" * width for width in widths).rstrip())
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, _RIGHT, strict=True)
        )
        text.append("  ".join(padded).rstrip())
    return "\n".join([*text, _note(results)])


def knn_markdown(results: Mapping[str, Any]) -> str:
    """Return the same in Markdown, for TensorBoard and the README; gains and losses are bold.

    Args:
        results: what results.json holds.
    """
    lines = [
        "| " + " | ".join(_HEADERS) + " |",
        "|" + "|".join("---:" if right else "---" for right in _RIGHT) + "|",
    ]
    for row in _rows(results):
        cells = [cell.replace("|", r"\|") for cell in row.cells]
        if row.verdict in ("gain", "loss"):
            cells[5], cells[7] = f"**{cells[5]}**", f"**{cells[7]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"{_title(results)}", "", *lines, "", _note(results)])


def print_knn_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Show the k-NN part of results.json: the coloured table in a terminal, plain text elsewhere.

    Args:
        results: what results.json holds.
        console: None for standard output.
    """
    console = console or Console()
    if console.is_terminal:
        console.print(knn_table(results), soft_wrap=True)
    else:
        console.file.write(knn_text(results) + "\n")


def _widths(rows: list[_Row]) -> list[int]:
    return [
        max(len(cells[column]) for cells in (_HEADERS, *(row.cells for row in rows))) for column in range(len(_HEADERS))
    ]


def _title(results: Mapping[str, Any]) -> str:
    run = [str(results[key]) for key in ("approach", "preset") if key in results]
    run += [f"seed {results['seed']}"] if "seed" in results else []
    temperatures = sorted({entry["temperature"] for entry in results["knn"].values() if "temperature" in entry})
    protocol = "k-NN" + "".join(f", T = {temperature:g}" for temperature in temperatures)
    return f"{protocol}: {', '.join(run)}" if run else protocol


def _rows(results: Mapping[str, Any]) -> list[_Row]:
    entries: Mapping[str, Mapping[str, Any]] = results["knn"]
    ordered = sorted(entries.items(), key=lambda item: item[1]["domain"] != "in")  # stable: in domain first
    rows = [_set_row(name, entry) for name, entry in ordered]
    for domain in ("in", "out"):
        members = [entry for entry in entries.values() if entry["domain"] == domain]
        if members:
            rows.append(_mean_row(domain, members))
    return rows


def _set_row(name: str, entry: Mapping[str, Any]) -> _Row:
    head = (name, entry["domain"], str(entry["k"]), _shown(_share(entry, "pretrained")))
    if entry.get("finetuned") is None:
        return _Row((*head, "", "", "", ""), "")
    return _changed((*head, _shown(_share(entry, "finetuned"))), Interval(entry["delta"], *entry["ci95"]))


def _mean_row(domain: str, entries: Iterable[Mapping[str, Any]]) -> _Row:
    entries = list(entries)
    head = ("mean", domain, "", _shown(mean_of_intervals([_share(entry, "pretrained") for entry in entries])))
    if any(entry.get("finetuned") is None for entry in entries):
        return _Row((*head, "", "", "", ""), "", mean=True)
    after = mean_of_intervals([_share(entry, "finetuned") for entry in entries])
    change = mean_of_intervals([Interval(entry["delta"], *entry["ci95"]) for entry in entries])
    return _changed((*head, _shown(after)), change, mean=True)


def _changed(cells: tuple[str, ...], change: Interval, mean: bool = False) -> _Row:
    verdict: _Verdict = "gain" if change.low > 0 else "loss" if change.high < 0 else "unsure"
    if change.low == change.high == 0:  # right and wrong on the same pictures, as where no encoder trains
        verdict = "unchanged"
    interval = f"[{points(change.low)}, {points(change.high)}]"
    return _Row((*cells, points(change.estimate), interval, verdict), verdict, mean)


def _share(entry: Mapping[str, Any], key: str) -> Interval:
    """Return an accuracy with Wilson's interval; without the number of queries nobody knows its width."""
    if "test" not in entry:
        return Interval(entry[key], math.nan, math.nan)
    return wilson(round(entry[key] * entry["test"]), entry["test"])


def _shown(share: Interval) -> str:
    half = (share.high - share.low) / 2
    return percent(share.estimate) + ("" if math.isnan(half) else f" +-{100 * half:.1f}")


def _note(results: Mapping[str, Any]) -> str:
    return _NOTE + (f"\nProtocol: {results['protocol']}" if "protocol" in results else "")


def percent(fraction: float) -> str:
    """Return 0.5124 as "51.2"."""
    return f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    """Return -0.0241 as "-2.4", and what rounds to nothing as "0.0"."""
    shown = f"{100 * fraction:+.1f}"
    return "0.0" if shown in ("+0.0", "-0.0") else shown
