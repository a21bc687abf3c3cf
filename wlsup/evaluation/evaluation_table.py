"""evaluation.json as a person reads it: every figure with its 95 % interval, the protocols below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from wlsup.evaluation.table import percent, points

__all__ = ["evaluation_markdown", "evaluation_text", "print_evaluation"]

_HEADERS = ("set", "domain", "measured", "pretrained", "fine-tuned", "change", "")
_CALIBRATION = {
    "ece": "ECE, %",
    "adaptive": "adaptive ECE, %",
    "classwise": "classwise ECE, %",
    "nll": "NLL, nats",
    "brier": "Brier",
}
_INTERVALS = (
    "In brackets 95 % intervals: Wilson's for accuracies, paired bootstrap over test pictures for changes; of few\n"
    "shots over draws and test pictures; of CKA the jackknife's; of calibration errors the basic bootstrap's, which\n"
    "takes off what noise adds and may lie below the figure. All are for this seed. Better or worse: the change's\n"
    "interval excludes 0."
)
_Cells = tuple[str, ...]


def evaluation_text(results: Mapping[str, Any], title: str = "") -> str:
    """Return title, a line a figure, classes that changed, and the protocols, as plain text.

    Args:
        results: evaluation.json.
        title: above it.
    """
    rows = _rows(results)
    alone = not any(row[4] for row in rows)
    keep = [0, 1, 2, 3] if alone else list(range(7))
    lines = [[cells[i] for i in keep] for cells in (_HEADERS, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keep))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "  ".join("-" * width for width in widths).rstrip()
    text = [*([title] if title else []), shown[0], rule, *shown[1:], _INTERVALS, *_class_lines(results)]
    return "\n".join([*text, *(f"{name}: {identifier}" for name, identifier in results["protocol"].items())])


def evaluation_markdown(results: Mapping[str, Any]) -> str:
    """Return the same in Markdown, for TensorBoard."""
    lines = ["| " + " | ".join(_HEADERS) + " |", "|---|---|---|---:|---:|---:|---|"]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in _rows(results)]
    notes = [_INTERVALS.replace("\n", " "), *_class_lines(results)]
    notes += [f"{name}: {identifier}" for name, identifier in results["protocol"].items()]
    return "\n".join([*lines, "", "\n\n".join(notes)])


def print_evaluation(results: Mapping[str, Any], title: str, console: Console | None = None) -> None:
    """Show it, to standard output unless told otherwise."""
    console = console or Console()
    console.file.write(evaluation_text(results, title) + "\n")


def _rows(results: Mapping[str, Any]) -> list[_Cells]:
    rows: list[_Cells] = []
    for name, entry in sorted(results["sets"].items(), key=lambda item: item[1]["domain"] != "in"):
        for position, cells in enumerate(_set_rows(entry)):
            rows.append((*((name, entry["domain"]) if position == 0 else ("", "")), *cells))
    if retrieval := results.get("retrieval"):
        for direction in ("image_to_text", "text_to_image"):
            for k, value in retrieval[direction].items():
                what = f"{direction.replace('_', ' ')} R@{k}, %"
                value = percent(value) + " " + _limits(retrieval["ci95"][direction][k], percent)
                chance = f"chance {percent(retrieval['chance'][k])}"
                rows.append((f"{retrieval['pairs']} held-out pairs", "", what, "-", value, chance, ""))
    return rows


def _set_rows(entry: Mapping[str, Any]) -> list[_Cells]:
    rows = [_row(f"k-NN, k = {entry['knn']['k']}, %", entry["knn"])]
    if "probe" in entry:
        rows.append(_row("linear probe, %", entry["probe"]))
    for name, by_shots in entry.get("few_shot", {}).items():
        rows += [_row(f"{k}-shot {name}, %", one) for k, one in by_shots.items()]
    if zero := entry.get("zero_shot"):
        value = f"{percent(zero['accuracy'])} {_limits(zero['ci95'], percent)}"
        rows.append(("zero-shot, %", "-", value, f"chance {percent(zero['chance'])}", ""))
    for source, scores in entry.get("calibration", {}).items():
        for score, what in _CALIBRATION.items():
            if score in scores:
                rows.append(_row(f"{what}: {source}", scores[score], plain=score in ("nll", "brier"), lower=True))
    if moved := entry.get("drift"):
        for key, what in (("cka", "CKA"), ("knn_overlap", f"{moved['k']}-NN kept"), ("cosine", "cosine")):
            if moved.get(key) is not None:
                chance = f"chance {moved['chance']:.3f}" if key == "knn_overlap" else ""
                value = f"{moved[key]:.3f} {_limits(moved[f'{key}_ci95'], '{:.3f}'.format)}"
                rows.append((f"{what} with pretrained", "-", value, chance, ""))
    return rows


def _row(what: str, one: Mapping[str, Any], plain: bool = False, lower: bool = False) -> _Cells:
    show = "{:.3f}".format if plain else percent
    cells = [what, f"{show(one['pretrained'])} {_limits(one['pretrained_ci95'], show)}"]
    if "finetuned" not in one:
        return (*cells, "", "", "")
    cells.append(f"{show(one['finetuned'])} {_limits(one['finetuned_ci95'], show)}")
    signed = "{:+.3f}".format if plain else points
    cells.append(f"{signed(one['delta'])} {_limits(one['ci95'], signed)}")
    low, high = one["ci95"]
    up, down = ("worse", "better") if lower else ("better", "worse")
    return (*cells, up if low > 0 else down if high < 0 else "unsure")


def _class_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the classes that surely changed, set by set."""
    lines = []
    for name, entry in results["sets"].items():
        rows = entry.get("classes", [])
        if not rows or "verdict" not in rows[0]:
            continue
        for verdict in ("helped", "hurt"):
            sure = [row for row in rows if row["verdict"] == verdict]
            sure = sure if verdict == "helped" else sure[::-1]
            told = [f"{one['class']} {points(one['delta'])} {_limits(one['ci95'], points)}" for one in sure[:5]]
            more = f" and {len(sure) - 5} more" if len(sure) > 5 else ""
            if told:
                lines.append(f"{name}: {verdict} (Holm over {len(rows)} classes): {', '.join(told)}{more}")
    return lines


def _limits(interval: Any, show: Any) -> str:
    return f"[{show(interval[0])}, {show(interval[1])}]"
