"""WiSE-FT's curve as a person reads it: a row an alpha, a column a set and scorer, an interval beside every number."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from wlsup.evaluation.statistics import Interval, mean_of_intervals, wilson

__all__ = ["wise_ft_markdown", "wise_ft_text"]


def wise_ft_text(curve: Mapping[str, Any], title: str) -> str:
    """Return the table as plain text.

    Args:
        curve: what wise_ft.json holds.
        title: its first line.
    """
    head, rows = _rows(curve)
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = [title]
    for position, line in enumerate((head, *rows)):
        padded = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        lines.append("  ".join(padded).rstrip())
        if position == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join([*lines, *(line for note in _notes(curve) for line in textwrap.wrap(note, 100))])


def wise_ft_markdown(curve: Mapping[str, Any], title: str) -> str:
    """Return the same in Markdown, for TensorBoard."""
    head, rows = _rows(curve)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([title, "", *lines, "", *_notes(curve)])


def _rows(curve: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    validation = curve["validation"]
    sets = sorted(curve["sets"].items(), key=lambda item: item[1]["domain"] != "in")
    columns: list[tuple[str, list[str]]] = []
    if validation["sets"]:
        parts = [_share(one["accuracy"][0], one["validation"]) for one in validation["by_set"].values()]
        cells = _column(mean_of_intervals(parts), validation["accuracy"], validation["ci95"])
        columns.append(("validation (in)", cells))
    for name, entry in sets:
        for scorer, accuracy, intervals in (("", "accuracy", "ci95"), (", probe", "probe", "probe_ci95")):
            if accuracy in entry:
                first = _share(entry[accuracy][0], entry["test"])
                cells = _column(first, entry[accuracy], entry[intervals])
                columns.append((f"{name} ({entry['domain']}){scorer}", cells))
    alphas = [f"{alpha:g}" + (" *" if alpha == curve["chosen_alpha"] else "") for alpha in curve["alphas"]]
    rows = zip(alphas, *(cells for _, cells in columns), strict=True)
    return ["alpha", *(head for head, _ in columns)], [list(row) for row in rows]


def _column(first: Interval, accuracy: Sequence[float], intervals: Sequence[Sequence[float]]) -> list[str]:
    """Return cells: accuracy at alpha 0 with its own interval, at the others with that of the change."""
    rest = zip(accuracy[1:], intervals[1:], strict=True)
    return [
        f"{100 * first.estimate:.1f} +-{50 * (first.high - first.low):.1f}",
        *(f"{100 * value:.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" for value, (low, high) in rest),
    ]


def _share(accuracy: float, pictures: int) -> Interval:
    return wilson(round(accuracy * pictures), pictures)


def _notes(curve: Mapping[str, Any]) -> list[str]:
    scorers = "k-NN and linear probe" if any("probe" in entry for entry in curve["sets"].values()) else "k-NN"
    lines = [
        f"Accuracy in % by {scorers}; at alpha 0 +- half of Wilson's 95% interval (of validation made of the sets' "
        "own), in brackets the 95% interval of the change from alpha 0, in points (paired bootstrap over test "
        "pictures). alpha 0 is the pretrained encoder, 1 the fine-tuned one.",
        f"* chosen: {curve['chosen_alpha']:g} = {curve['rule']}.",
    ]
    chosen = curve["alphas"].index(curve["chosen_alpha"])
    for name, means in curve["summary"].items():
        if means:
            low, high = means["ci95"][chosen]
            lines.append(
                f"At the chosen alpha, mean change {name.replace('_', ' ')}: {100 * means['delta'][chosen]:+.1f} "
                f"[{100 * low:+.1f}, {100 * high:+.1f}]."
            )
    return [*lines, f"Protocol: {curve['protocol']}."]
