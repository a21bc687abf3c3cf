"""What was measured beside k-NN: probe, few-shot, calibration, drift, retrieval, captions, the approach's own task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from wlsup.evaluation.report.blocks import Block, Cell, Section, Table, Text, change, figure, number, share
from wlsup.evaluation.report.groups import Basis, Estimate, Group, of_share, over_seeds
from wlsup.evaluation.report.runs import Run

__all__ = ["beyond_knn", "tasks"]

_ELSEWHERE = ("knn", "classes")  # metrics that have sections of their own
_ACCURACIES = ("knn", "probe", "few_shot", "zero_shot")  # of what more is better
_WIDEST = 6  # columns of figures
_KINDS = ("value", "pretrained", "fine-tuned", "delta", "chance")
_NAMES = {
    "few_shot": "few-shot",
    "zero_shot": "zero-shot",
    "knn": "k-NN",
    "knn_overlap": "k-NN overlap",
    "cka": "CKA",
    "ece": "ECE",
    "nll": "NLL",
    "brier": "Brier",
}


def beyond_knn(groups: Sequence[Group]) -> Section:
    """Return every figure of evaluation.json, a table a metric: rows are approaches and sets, columns its figures.

    The file is walked, so that a metric which this page does not know is shown as well: a figure is a number with its
    ``ci95``, a ``delta`` with one is a change; ``chance`` has none. Retrieval is of held-out pairs, not of a set.
    """
    found: dict[str, dict[tuple[str, str], dict[str, Estimate]]] = {}
    protocols: dict[str, set[str]] = {}
    for group in groups:
        for metric, per_set in _metrics(group).items():
            for name, figures in per_set.items():
                found.setdefault(metric, {})[group.name, name] = figures
        for run in group.runs:
            told = run.evaluation.get("protocol")
            for metric, protocol in (told if isinstance(told, dict) else {}).items():
                protocols.setdefault(metric, set()).add(str(protocol))
    title = "Beyond k-NN"
    retrieval = _retrieval(groups, _evaluated_retrieval)
    if not found and retrieval is None:
        return Section("beyond", title, [Text("No run has evaluation.json: `wlsup evaluate RUN` makes it.")])
    blocks: list[Block] = [
        Text(
            "Brackets: 95 % interval, of several seeds over seeds (Student’s t), of one seed as the metric’s protocol "
            "says. Changes are fine-tuned minus pretrained."
        )
    ]
    for metric, rows in found.items():
        protocol = "; ".join(sorted(protocols.get(metric, ()))) or "not recorded"
        name = _name(metric)
        blocks.append(_table(f"{name[0].upper()}{name[1:]}. Protocol: {protocol}.", rows, metric in _ACCURACIES))
    if retrieval is not None:
        blocks.append(retrieval)
    return Section("beyond", title, blocks)


def _table(caption: str, rows: Mapping[tuple[str, str], Mapping[str, Estimate]], judged: bool) -> Table:
    """Return a metric's table: its figures are columns, or where those would be too many for a sheet of paper, rows."""
    columns = list(dict.fromkeys(column for figures in rows.values() for column in figures))
    if len(columns) <= _WIDEST:
        cells = tuple(
            (Cell(approach), Cell(name), *(_cell(column, figures.get(column), judged) for column in columns))
            for (approach, name), figures in rows.items()
        )
        return Table(caption, ("approach", "set", *(_header(column, judged) for column in columns)), cells, words=2)
    parts = [_parted(column) for column in columns]
    kinds = [kind for kind in _KINDS if any(kind == of for _, of in parts)]
    lines = []
    for (approach, name), figures in rows.items():
        for what in dict.fromkeys(what for what, _ in parts):
            mine = {kind: column for column, (of, kind) in zip(columns, parts, strict=True) if of == what}
            if any(column in figures for column in mine.values()):
                shown = [_cell(mine.get(kind, kind), figures.get(mine.get(kind, "")), judged) for kind in kinds]
                lines.append((Cell(approach), Cell(name), Cell(what), *shown))
    headers = ("approach", "set", "figure", *(_header(kind, judged) for kind in kinds))
    return Table(caption, headers, tuple(lines), words=3)


def _parted(column: str) -> tuple[str, str]:
    """Part "k-NN NLL fine-tuned" into what is measured, and of which encoder."""
    what, _, kind = column.rpartition(" ")
    return (what, kind) if what and kind in _KINDS else (column, "value")


def tasks(groups: Sequence[Group]) -> Section:
    """Return retrieval, caption scores and what approaches measured of themselves."""
    blocks: list[Block] = []
    if table := _retrieval(groups, lambda run: run.results.get("retrieval") or {}):
        blocks.append(table)
    if table := _captioning(groups):
        blocks.append(table)
    for group in groups:
        if table := _task(group):
            blocks.append(table)
    none = [Text("No run measured retrieval, captions or a task of its own.")]
    return Section("tasks", "Captions and pictures: retrieval, captioning, tasks", blocks or none)


def _metrics(group: Group) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Return the group's figures over its runs that have them: metric -> set -> figure -> estimate."""
    runs = [run.evaluation for run in group.runs if run.evaluation]
    found: dict[str, dict[str, dict[str, list[tuple[float, Any]]]]] = {}
    for evaluation in runs:
        parts = {name: entry for name, entry in (evaluation.get("sets") or {}).items() if isinstance(entry, dict)}
        for name, metrics in parts.items():
            for metric, node in metrics.items():
                if not isinstance(node, dict) or metric in _ELSEWHERE:
                    continue
                for path, value, interval in _figures(node):
                    column = found.setdefault(metric, {}).setdefault(name, {}).setdefault(path, [])
                    column.append((value, interval))
    return {
        metric: {name: {path: _estimate(values) for path, values in paths.items()} for name, paths in sets.items()}
        for metric, sets in found.items()
    }


def _figures(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float, list[float] | None]]:
    """Yield (path, value, interval) of a metric's figures; chance has no interval."""
    interval = node.get("ci95")
    for key, value in node.items():
        here = f"{path} {_name(key)}".strip()
        if isinstance(value, dict):
            yield from _figures(value, here)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            own = node.get(f"{key}_ci95")
            if own is None and key in ("delta", "value", "accuracy"):
                own = interval
                here = path if key == "value" else here
            if key == "chance":
                yield here, float(value), None
            elif isinstance(own, list) and len(own) == 2:
                yield here, float(value), own


def _estimate(values: Sequence[tuple[float, Any]]) -> Estimate:
    if len(values) > 1:
        return over_seeds([value for value, _ in values])
    value, interval = values[0]
    return Estimate(value, *interval, "pictures") if interval else over_seeds([value])


def _cell(column: str, estimate: Estimate | None, percent: bool) -> Cell:
    if estimate is None:
        return Cell("–", "not measured")
    if column.endswith("chance"):
        return Cell(number(100 * estimate.value, 1) if percent else number(estimate.value, 3), "computed")
    if column.endswith("delta"):
        if percent:
            return change(estimate)
        return figure(estimate, lambda value: number(value, 3, signed=True))
    return share(estimate) if percent else figure(estimate, lambda value: number(value, 3))


def _header(column: str, percent: bool) -> str:
    name = column.removesuffix("delta") + "change" if column.endswith("delta") else column
    return f"{name}, {'points' if column.endswith('delta') else '%'}" if percent else name


def _name(key: str) -> str:
    return _NAMES.get(str(key), str(key).replace("_", " ").replace("finetuned", "fine-tuned"))


def _evaluated_retrieval(run: Run) -> dict[str, Any]:
    """Return evaluation.json's recalls in the form of results.json's."""
    found = run.evaluation.get("retrieval") or {}
    return found and {**found, "protocol": (run.evaluation.get("protocol") or {}).get("retrieval")}


def _retrieval(groups: Sequence[Group], of: Callable[[Run], Mapping[str, Any]]) -> Table | None:
    """Return held-out recall, a row a group, over its runs that have it."""
    rows, protocols = [], set()
    columns = [(way, k) for way in ("image_to_text", "text_to_image") for k in ("1", "5", "10")]
    for group in groups:
        found = [one for run in group.runs if (one := of(run)).get("image_to_text")]
        if not found:
            continue
        protocols |= {str(one.get("protocol") or "cosine, expected recall among equals") for one in found}
        cells = []
        for direction, k in columns:
            values = [one[direction][k] for one in found if k in one.get(direction, {})]
            interval = (found[0].get("ci95") or {}).get(direction, {}).get(k)
            whole = len(values) == len(found)
            cells.append(_recall(values, interval, found[0]["pairs"]) if whole else Cell("–", "not recorded"))
        chance = ", ".join(f"{100 * value:.1f}" for value in found[0]["chance"].values())
        rows.append((Cell(group.name), Cell(str(found[0]["pairs"])), *cells, Cell(chance, "computed")))
    if not rows:
        return None
    ways = {"image_to_text": "picture to text", "text_to_image": "text to picture"}
    headers = ("approach", "pairs", *(f"{ways[way]} R@{k}" for way, k in columns))
    return Table(
        "Held-out retrieval, in %: how often the right one is among the k nearest. Brackets: 95 % interval over seeds "
        f"(Student’s t), of one seed over pairs. Protocol: {'; '.join(sorted(protocols))}.",
        (*headers, "chance, R@1, 5, 10"), tuple(rows),
    )  # fmt: skip


def _recall(values: Sequence[float], interval: Any, pairs: int) -> Cell:
    if len(values) > 1:
        return share(over_seeds(values))
    return share(Estimate(values[0], *interval, "pairs") if interval else of_share(values[0], pairs, "pairs"))


def _captioning(groups: Sequence[Group]) -> Table | None:
    rows, how, protocols = [], set(), set()
    scored = [
        group for group in groups if all((run.results.get("captioning") or {}).get("scores") for run in group.runs)
    ]
    names = [
        name for name in _SCORES if any(name in run.results["captioning"]["scores"] for g in scored for run in g.runs)
    ]
    for group in scored:
        found = [run.results["captioning"] for run in group.runs]
        cells = []
        for name in names:
            entries = [one["scores"].get(name) for one in found]
            whole = all(entries)
            estimate = _over([e["value"] for e in entries], entries[0].get("ci95"), "pictures") if whole else None
            cells.append(figure(estimate, lambda value: number(value, 3)))
        rows.append((Cell(group.name), *cells))
        one = found[0]
        many = f"{one.get('pictures')} held-out pictures, {one.get('references')} human captions"
        how.add(f"{group.name}: {many}, {one.get('generation')}")
        protocols |= {str(entry.get("protocol") or "not recorded") for entry in found}
    if not rows:
        return None
    return Table(
        "Caption scores. BLEU, ROUGE-L and METEOR lie in [0, 1], CIDEr-D in [0, 10]. Brackets: 95 % interval over "
        f"seeds (Student’s t), of one seed over pictures (bootstrap). Protocol: {'; '.join(sorted(protocols))}.",
        ("approach", *(_SCORES[name] for name in names)), tuple(rows), note=f"{'; '.join(sorted(how))}.",
    )  # fmt: skip


_SCORES = {
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "meteor": "METEOR (nltk)",
    "loss": "caption loss, nats a token",
}


def _task(group: Group) -> Table | None:
    found = [run.results.get("task") or {} for run in group.runs]
    if not all(one.get("rows") for one in found):
        return None
    rows = []
    for row in found[0]["rows"]:
        same = [one for task in found for one in task["rows"] if one["what"] == row["what"]]
        unit = row.get("unit") or ""
        digits = 1 if unit == "%" else 3
        estimate = _over([one["value"] for one in same], row.get("ci95"), "pictures")
        chance = Cell("–") if row.get("chance") is None else Cell(number(row["chance"], digits), "computed")
        rows.append(
            (
                Cell(row["what"]),
                Cell(unit),
                figure(estimate, lambda value, digits=digits: number(value, digits)),
                chance,
            )
        )
    note = found[0].get("note") or ""
    protocol = found[0].get("protocol") or "not recorded"
    return Table(
        f"{found[0].get('title')} ({group.name}). {_over_what(group)} Protocol: {protocol}.",
        ("measured", "unit", "value", "chance"), tuple(rows), words=2, note=str(note),
    )  # fmt: skip


def _over(values: Sequence[float], interval: Any, over: Basis) -> Estimate:
    if len(values) > 1:
        return over_seeds(values)
    return Estimate(values[0], *interval, over) if interval else over_seeds(values)


def _over_what(group: Group) -> str:
    if len(group.runs) > 1:
        return f"Mean and 95 % interval over {len(group.runs)} seeds (Student’s t)."
    return "One seed; brackets, where there are any: 95 % interval over test pictures."
