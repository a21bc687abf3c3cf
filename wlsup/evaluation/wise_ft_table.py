"""WiSE-FT's curve as a person reads it: a row an alpha, a column a set, an interval beside every change."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

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
    head = [
        "alpha",
        *(["validation (in)"] if validation["sets"] else []),
        *(f"{name} ({entry['domain']})" for name, entry in sets),
    ]
    rows = []
    for position, alpha in enumerate(curve["alphas"]):
        row = [f"{alpha:g}" + (" *" if alpha == curve["chosen_alpha"] else "")]
        for entry in ([validation] if validation["sets"] else []) + [entry for _, entry in sets]:
            low, high = entry["ci95"][position]
            shown = f"{100 * entry['accuracy'][position]:.1f}"
            row.append(shown if alpha == 0 else f"{shown} [{100 * low:+.1f}, {100 * high:+.1f}]")
        rows.append(row)
    return head, rows


def _notes(curve: Mapping[str, Any]) -> list[str]:
    lines = [
        "k-NN accuracy in %; in brackets the 95% interval of the change from alpha 0, in points (paired bootstrap over "
        "test pictures). alpha 0 is the pretrained encoder, 1 the fine-tuned one.",
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
