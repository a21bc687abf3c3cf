"""The classes that training helped most and hurt most, with pictures whose answer it changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wlsup.evaluation.classes import file_name
from wlsup.evaluation.report.blocks import Block, Cell, Section, Table, Text, change, share
from wlsup.evaluation.report.groups import Estimate, Group, of_share, over_seeds
from wlsup.evaluation.report.pictures import Picture, class_thumbnails, shown

__all__ = ["classes"]

_MOST = 3
_SHOWN = 4
_WORDS = {"helped": "wrong before, right after", "hurt": "right before, wrong after"}


def classes(groups: Sequence[Group]) -> Section:
    """Return, by group and set, the most helped and the most hurt classes."""
    title = "Classes: most helped, most hurt"
    tables: list[Block] = [table for group in groups if (table := _table(group)) is not None]
    if not tables:
        return Section("classes", title, [Text("No run has its classes: `wlsup evaluate RUN` writes them.")])
    text = (
        "Picked because they changed most: of many classes some change by chance, and the extremes overstate it. Over "
        "several seeds the interval is Student’s t, of one seed over the class’s pictures; neither is corrected for "
        "the choice. Holm: in how many seeds the change stands after correction for all classes of the set."
    )
    return Section("classes", title, [Text(text), *tables])


def _table(group: Group) -> Table | None:
    cells = []
    for name in group.sets:
        pictures = _pictures(group, name)
        for row in _rows(group, name):
            kind = "helped" if row["delta"] > 0 else "hurt"
            few = pictures.get((kind, row["file"]), ())
            cells.append(
                (
                    Cell(name), Cell(row["class"]), Cell(_WORDS[kind] if few else "none kept", pictures=few),
                    Cell(str(row["n"])), share(_accuracy(row, "pretrained")), share(_accuracy(row, "finetuned")),
                    change(_delta(row)), Cell(_holm(row)),
                )
            )  # fmt: skip
    if not cells:
        return None
    headers = (
        "set",
        "class",
        "example pictures",
        "pictures",
        "pretrained, %",
        "fine-tuned, %",
        "change, points",
        "Holm",
    )
    seeds = sum(bool(run.evaluation) for run in group.runs)
    told = (
        f"{group.name}, {seeds} seed{'s' if seeds > 1 else ''}. A class’s pictures are of the first seed that has some."
    )
    return Table(told, headers, tuple(cells), words=3)


def _rows(group: Group, name: str) -> list[dict[str, Any]]:
    """Return the most helped and most hurt classes, by mean change over the seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in group.runs:
        entry = (run.evaluation.get("sets") or {}).get(name) or {}
        for row in entry.get("classes") or []:
            found.setdefault(str(row["class"]), []).append(row)
    many = max(map(len, found.values()), default=0)
    rows = [
        {
            "class": key, "file": file_name(key), "n": same[0]["n"], "rows": same,
            "delta": sum(row["delta"] for row in same) / len(same),
        }
        for key, same in found.items()
        if len(same) == many
    ]  # fmt: skip
    rows.sort(key=lambda row: -row["delta"])
    helped = [row for row in rows[:_MOST] if row["delta"] > 0]
    return helped + [row for row in rows[-_MOST:] if row["delta"] < 0]


def _accuracy(row: Mapping[str, Any], key: str) -> Estimate:
    same = row["rows"]
    if len({one[key] for one in same}) == 1:
        interval = same[0].get(f"{key}_ci95")
        return (
            Estimate(same[0][key], *interval, "pictures") if interval else of_share(same[0][key], row["n"], "pictures")
        )
    return over_seeds([one[key] for one in same])


def _delta(row: Mapping[str, Any]) -> Estimate:
    same = row["rows"]
    if len(same) == 1:
        interval = same[0].get("ci95")
        return Estimate(same[0]["delta"], *(interval or (None, None)), "pictures" if interval else "none")
    return over_seeds([one["delta"] for one in same])


def _holm(row: Mapping[str, Any]) -> str:
    values = [one.get("p_holm") for one in row["rows"]]
    if any(value is None for value in values):
        return "–"
    return f"{sum(value < 0.05 for value in values)} of {len(values)}"


def _pictures(group: Group, name: str) -> dict[tuple[str, str], tuple[Picture, ...]]:
    """Return thumbnails by ("helped" or "hurt", class as in their files' names), of the first seed that has some."""
    found: dict[tuple[str, str], tuple[Picture, ...]] = {}
    for run in group.runs:
        for (kind, label), files in class_thumbnails(run.folder, file_name(name)).items():
            if not found.get((kind, label)):
                read = [shown(file.read_bytes(), f"{label} of {name}, {_WORDS[kind]}") for file in files[:_SHOWN]]
                found[kind, label] = tuple(picture for picture in read if picture is not None)
    return found
