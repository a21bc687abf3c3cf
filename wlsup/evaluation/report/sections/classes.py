"""The classes that training helped most and hurt most, with pictures whose answer it changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wlsup.evaluation.report.blocks import Block, Cell, Pictures, Section, Shown, Table, Text, change, share
from wlsup.evaluation.report.groups import Estimate, Group, over_seeds, wilson
from wlsup.evaluation.report.pictures import Picture, class_thumbnails, shown

__all__ = ["classes"]

_MOST = 3
_SHOWN = 4


def classes(groups: Sequence[Group]) -> Section:
    """Return, by group and set, the most helped and the most hurt classes."""
    title = "Classes: most helped, most hurt"
    blocks: list[Block] = []
    for group in groups:
        for name in group.sets:
            rows = _rows(group, name)
            if rows:
                blocks.append(_table(group, name, rows))
                blocks += _pictures(group, name, {str(row["class"]) for row in rows})
    if not blocks:
        return Section("classes", title, [Text("No run has its classes: `wlsup evaluate RUN` writes them.")])
    text = Text(
        "Picked because they changed most: of many classes some change by chance, and the extremes overstate it. Over several "
        "seeds the interval is Student’s t, of one seed over the class’s pictures; neither is corrected for the choice."
    )
    return Section("classes", title, [text, *blocks])


def _rows(group: Group, name: str) -> list[dict[str, Any]]:
    """Return the most helped and most hurt classes, by mean change over the seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in group.runs:
        entry = (run.evaluation.get("sets") or {}).get(name) or {}
        for row in entry.get("classes") or []:
            found.setdefault(str(row["class"]), []).append(row)
    many = max(map(len, found.values()), default=0)
    rows = [
        {"class": key, "n": same[0]["n"], "rows": same, "delta": sum(row["delta"] for row in same) / len(same)}
        for key, same in found.items()
        if len(same) == many
    ]
    rows.sort(key=lambda row: -row["delta"])
    helped = [row for row in rows[:_MOST] if row["delta"] > 0]
    return helped + [row for row in rows[-_MOST:] if row["delta"] < 0]


def _table(group: Group, name: str, rows: Sequence[dict[str, Any]]) -> Table:
    cells = tuple(
        (
            Cell(row["class"]), Cell(str(row["n"])), share(_accuracy(row, "pretrained")), share(_accuracy(row, "finetuned")),
            change(_delta(row)), Cell(_holm(row)),
        )
        for row in rows
    )  # fmt: skip
    seeds = max(len(row["rows"]) for row in rows)
    return Table(
        f"{group.name} on {name} ({seeds} seed{'s' if seeds > 1 else ''}): accuracy in %, change in points.",
        ("class", "pictures", "pretrained", "fine-tuned", "change", "after Holm, in seeds"), cells,
    )  # fmt: skip


def _accuracy(row: dict[str, Any], key: str) -> Estimate:
    same = row["rows"]
    if len({one[key] for one in same}) == 1:
        interval = same[0].get(f"{key}_ci95")
        return Estimate(same[0][key], *interval, "pictures") if interval else wilson(same[0][key], row["n"], "pictures")
    return over_seeds([one[key] for one in same])


def _delta(row: dict[str, Any]) -> Estimate:
    same = row["rows"]
    if len(same) == 1:
        interval = same[0].get("ci95") or (None, None)
        return Estimate(same[0]["delta"], *interval, "pictures" if same[0].get("ci95") else "none")
    return over_seeds([one["delta"] for one in same])


def _holm(row: dict[str, Any]) -> str:
    values = [one.get("p_holm") for one in row["rows"]]
    if any(value is None for value in values):
        return "–"
    return f"{sum(value < 0.05 for value in values)} of {len(values)}"


def _pictures(group: Group, name: str, wanted: set[str]) -> list[Block]:
    run = next((run for run in group.runs if (run.folder / "classes" / name).is_dir()), None)
    if run is None:
        return []
    titles = {"helped": [], "hurt": []}
    by_slug = {_as_file(key): key for key in wanted}
    for (kind, _), files in sorted(class_thumbnails(run.folder, name).items()):
        told = files[0].name.split("-", 2)[2].rsplit("-", 1)[0]
        words = "wrong before, right after" if kind == "helped" else "right before, wrong after"
        label = by_slug.get(told, told)
        found = [shown(file.read_bytes(), f"{label}, {words}") for file in files[:_SHOWN]]
        kept: tuple[Picture, ...] = tuple(picture for picture in found if picture is not None)
        if kept:
            titles[kind].append(Shown(f"{label}: {words}", kept))
    return [
        Pictures(f"{group.name} on {name}, seed {run.seed}: pictures of the most {kind}", tuple(found), small=True)
        for kind, found in titles.items()
        if found
    ]


def _as_file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
