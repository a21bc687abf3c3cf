"""What results.json holds under "captioning", as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

__all__ = ["caption_markdown", "caption_text", "print_caption_table", "samples_markdown"]

_HEADERS = ("score", "value", "95% interval")
_NAMES = {
    **{f"bleu_{order}": f"BLEU-{order}" for order in range(1, 5)},
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "meteor": "METEOR (nltk)",
    "loss": "caption loss, nats a token",
}
_NOTE = (
    "BLEU, ROUGE-L and METEOR lie in [0, 1], CIDEr-D in [0, 10]; papers show them times 100. Bootstrap over pictures."
)


def caption_text(captioning: Mapping[str, Any], approach: str) -> str:
    """Return title, one line a score, what is absent and why, as plain text.

    Args:
        captioning: of results.json.
        approach: whose captions.
    """
    lines = [_HEADERS, *_rows(captioning)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(3)]
    rows = [f"{name.ljust(widths[0])}  {value.rjust(widths[1])}  {interval.rjust(widths[2])}".rstrip()
            for name, value, interval in lines]  # fmt: skip
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([_title(captioning, approach), rows[0], rule, *rows[1:], *_notes(captioning)])


def caption_markdown(captioning: Mapping[str, Any], approach: str) -> str:
    """Return the same in Markdown, for TensorBoard."""
    lines = ["| " + " | ".join(_HEADERS) + " |", "|---|---:|---:|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in _rows(captioning)]
    return "\n\n".join([_title(captioning, approach), "\n".join(lines), *_notes(captioning)])


def samples_markdown(samples: list[dict[str, Any]]) -> str:
    """Return pictures' names, generated and human captions in Markdown, for TensorBoard.

    Args:
        samples: [{"key": str, "generated": str, "references": [str]}].
    """
    lines = ["| picture | generated | human |", "|---|---|---|"]
    for sample in samples:
        cells = (sample["key"], sample["generated"], "<br>".join(sample["references"]))
        lines.append("| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def print_caption_table(captioning: Mapping[str, Any], approach: str, console: Console | None = None) -> None:
    """Show it under the k-NN table, to standard output unless told otherwise."""
    console = console or Console()
    console.file.write("\n" + caption_text(captioning, approach) + "\n")


def _title(captioning: Mapping[str, Any], approach: str) -> str:
    many = f"{captioning['pictures']} held-out pictures, {captioning['references']} human captions"
    return f"Captions of {many}: {approach}, {captioning['generation']}"


def _rows(captioning: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (_NAMES[name], f"{entry['value']:.3f}", "[{:.3f}, {:.3f}]".format(*entry["ci95"]))
        for name, entry in captioning["scores"].items()
    ]


def _notes(captioning: Mapping[str, Any]) -> list[str]:
    absent = [f"No {_NAMES[name]}: {why}." for name, why in captioning["absent"].items()]
    return [_NOTE, *absent, *([f"Protocol: {captioning['protocol']}."] if captioning.get("protocol") else [])]
