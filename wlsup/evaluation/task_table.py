"""What an approach measured of itself beside k-NN ("task" in results.json) as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from wlsup.evaluation.statistics import wilson

__all__ = ["print_task_table", "task_markdown", "task_text"]

_HEADERS = ("measured", "value", "chance")


def task_text(task: Mapping[str, Any]) -> str:
    """Return title, one line a figure, and the note, as plain text.

    Args:
        task: {"title", "rows": [{"what", "value", "unit", "chance", "n" or "ci95" where there is}], "note",
            "protocol"}; of a share of n cases the interval is Wilson's.
    """
    lines = [_HEADERS, *_cells(task)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(3)]
    rows = [f"{what.ljust(widths[0])}  {value.rjust(widths[1])}  {chance.rjust(widths[2])}".rstrip()
            for what, value, chance in lines]  # fmt: skip
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([task["title"], rows[0], rule, *rows[1:], *_notes(task)])


def task_markdown(task: Mapping[str, Any]) -> str:
    """Return the same in Markdown, for TensorBoard and the README."""
    lines = ["| " + " | ".join(_HEADERS) + " |", "|---|---:|---:|"]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in _cells(task)]
    return "\n".join([task["title"], "", *lines, "", "\n\n".join(_notes(task))]).rstrip()


def print_task_table(task: Mapping[str, Any], console: Console | None = None) -> None:
    """Show it under the k-NN table, to standard output unless told otherwise."""
    console = console or Console()
    console.file.write("\n" + task_text(task) + "\n")


def _notes(task: Mapping[str, Any]) -> list[str]:
    protocol = task.get("protocol")  # runs of before there was one have none
    return [*([task["note"]] if task.get("note") else []), *([f"Protocol: {protocol}."] if protocol else [])]


def _cells(task: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(row["what"], _with_interval(row), _figure(row.get("chance"), row.get("unit", ""))) for row in task["rows"]]


def _with_interval(row: Mapping[str, Any]) -> str:
    figure, unit = _figure(row["value"], row.get("unit", "")), row.get("unit", "")
    interval = row.get("ci95")
    if unit == "%" and "n" in row:
        interval = [100 * limit for limit in wilson(round(row["value"] / 100 * row["n"]), row["n"])[1:]]
    if interval is None:
        return figure
    low, high = (_figure(limit, unit).removesuffix(f" {unit}") for limit in interval)
    return f"{figure} [{low}, {high}]"


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "%":
        return f"{value:.1f} %"
    return f"{value:,.3f} {unit}".rstrip()
