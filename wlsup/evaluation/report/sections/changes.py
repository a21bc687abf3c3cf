"""What each approach changed: the findings in words, the table of changes, and home against away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wlsup.evaluation.report.blocks import Cell, Charts, Section, Table, Text, change, share
from wlsup.evaluation.report.figures.changes import changes_chart, front, scatter_chart
from wlsup.evaluation.report.groups import Group, over_seeds, wilson

__all__ = ["changes", "findings", "in_against_out", "interval_note", "set_domains", "used_protocols"]

_DOMAINS = {"in": "in domain", "out": "out of domain"}


def set_domains(groups: Sequence[Group]) -> dict[str, str]:
    """Return every evaluation set and its domain, in-domain ones first."""
    found: dict[str, str] = {}
    for group in groups:
        found |= group.sets
    return dict(sorted(found.items(), key=lambda item: item[1] != "in"))


def used_protocols(groups: Sequence[Group]) -> str:
    """Return the ids of the protocols that the k-NN figures follow; of all runs, one where they agree."""
    ids = {str(run.results.get("protocol") or "not recorded") for group in groups for run in group.runs}
    return "; ".join(sorted(ids))


def interval_note(groups: Sequence[Group]) -> str:
    """Return what the intervals beside the figures are over."""
    many = any(len(group.runs) > 1 for group in groups)
    one = any(len(group.runs) == 1 for group in groups)
    parts = []
    if many:
        parts.append("of several seeds, mean and 95 % interval over seeds (Student’s t)")
    if one:
        parts.append("of one seed, 95 % interval over test pictures (paired bootstrap), which says nothing about other seeds")
    return "Brackets: " + "; ".join(parts) + "."


def findings(groups: Sequence[Group], summaries: Mapping[str, str]) -> Section:
    """Return what was run and what came out, in sentences."""
    trained = [group for group in groups if not group.untouched]
    inside = {group.name: e for group in trained if (e := group.domain_delta("in")) is not None}
    outside = {group.name: e for group in trained if (e := group.domain_delta("out")) is not None}
    lines = [
        _counted(outside, "gain", "gained out of domain on average (95 % interval above 0)"),
        _counted(outside, "loss", "lost out of domain"),
        _counted(inside, "gain", "gained in domain"),
        _counted(inside, "loss", "lost in domain (95 % interval below 0)"),
    ]
    goal = [name for name, e in outside.items() if e.verdict == "gain" and name in inside and inside[name].verdict != "loss"]
    if inside and outside:
        lines.append(
            f"Gain out of domain with no loss in domain that the intervals can show: {', '.join(goal) or 'none'}."
        )
    untouched = [group.name for group in groups if group.untouched]
    if untouched:
        lines.append(f"Encoder unchanged, so that k-NN cannot move: {', '.join(untouched)}.")
    seeds = sorted({run.seed for group in groups for run in group.runs})
    runs = sum(len(group.runs) for group in groups)
    few = [group.name for group in groups if len(group.runs) < 3]
    sentences = [
        f"{runs} runs: {len(groups)} {'approach' if len(groups) == 1 else 'approaches'}, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}.",
        *(line for line in lines if line),
    ]
    if few:
        sentences.append(f"Fewer than three seeds, so read with care: {', '.join(few)}.")
    rows = tuple(
        (
            Cell(group.name), Cell(summaries.get(group.approach, "")), Cell(group.preset),
            Cell(", ".join(str(run.seed) for run in group.runs)),
            Cell(f"{group.runs[0].results['captions'].get('pairs', 0):,}"), Cell(f"{group.runs[0].results.get('steps', 0):,}"),
        )
        for group in groups
    )  # fmt: skip
    table = Table(
        "What was run.", ("approach", "what it is", "preset", "seeds", "pairs", "steps"), rows, words=4,
        note=" ".join(f"{group.name}: {note}" for group in groups for note in group.notes),
    )  # fmt: skip
    return Section("findings", "What came out", [*map(Text, sentences), table])


def changes(groups: Sequence[Group]) -> Section:
    """Return the table of changes against the pretrained encoder, and a figure a set."""
    sets = set_domains(groups)
    if not sets:
        return Section("changes", "Change of accuracy", [Text("No run has an evaluation set.")])
    domains = [domain for domain in _DOMAINS if domain in sets.values()]
    headers = ("approach", *(f"mean, {_DOMAINS[d]}" for d in domains), *(f"{name} ({d})" for name, d in sets.items()))
    first = [Cell("pretrained, accuracy in %"), *(Cell("") for _ in domains), *(_pretrained(groups, name) for name in sets)]
    rows = [tuple(first)]
    for group in groups:
        cells = [change(group.domain_delta(domain)) for domain in domains]
        rows.append((Cell(group.name), *cells, *(change(group.delta(name)) for name in sets)))
    cells = sum(len(row) - 1 for row in rows[1:])
    table = Table(
        "Change of k-NN accuracy against the pretrained encoder, in points. " + interval_note(groups)
        + f" Protocol: {used_protocols(groups)}.",
        headers, tuple(rows),
        note="▲ gain, ▼ loss: the interval excludes 0. No mark: it does not. A mean’s interval of one seed takes the sets as "
        f"independent. Each of the {cells} intervals stands alone: of so many, about {round(cells / 20)} would exclude 0 "
        "with nothing there.",
    )  # fmt: skip
    charts = tuple(changes_chart(groups, name, domain) for name, domain in sets.items())
    return Section("changes", "Change of accuracy, set by set", [table, Charts(charts)])


def in_against_out(groups: Sequence[Group]) -> Section:
    """Return the scatter of both domains with its Pareto front."""
    chart = scatter_chart(groups)
    if chart is None:
        return Section("front", "At home against away", [Text("No run has both an in-domain and an out-of-domain set.")])
    _, best = front(groups)
    text = (
        f"Beaten by none in both respects at once (dashed): {', '.join(best)}. The pretrained encoder is one of the points: "
        "what it beats is worse than doing nothing. The front is that of the means; where intervals overlap it may be "
        f"another. Protocol: {used_protocols(groups)}."
    )
    return Section("front", "At home against away", [Text(text), Charts((chart,), wide=True)])


def _pretrained(groups: Sequence[Group], name: str) -> Cell:
    entries = [run.results["knn"][name] for group in groups for run in group.runs if name in run.results["knn"]]
    values = {entry["pretrained"] for entry in entries}
    if len(values) == 1:
        value, count = entries[0]["pretrained"], max(entry.get("test", 0) for entry in entries)
        return share(wilson(value, count, "pictures") if count else over_seeds([value]))
    return Cell(f"{100 * min(values):.1f} to {100 * max(values):.1f}", "by encoder")


def _counted(estimates: Mapping[str, object], verdict: str, what: str) -> str:
    names = [name for name, estimate in estimates.items() if estimate.verdict == verdict]
    if not estimates:
        return ""
    many = f"{len(names)} of {len(estimates)} approaches that train the encoder {what}"
    return f"{many}: {', '.join(names)}." if names else f"{many}."
