"""What each approach changed: the findings in words, the table of changes, and home against away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wlsup.evaluation.report.blocks import Cell, Charts, Listed, Section, Table, Text, change, share
from wlsup.evaluation.report.figures.changes import changes_chart, front, scatter_chart
from wlsup.evaluation.report.groups import Estimate, Group, comparable, of_share, over_seeds

__all__ = ["changes", "findings", "in_against_out", "interval_note", "set_domains", "used_protocols",
           "what_was_run"]  # fmt: skip

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
        parts.append(
            "of one seed, 95 % interval over test pictures (paired bootstrap), which says nothing about other seeds"
        )
    return "Brackets: " + "; ".join(parts) + "."


def findings(groups: Sequence[Group]) -> Section:
    """Return what came out, in sentences."""
    trained = [group for group in groups if not group.untouched]
    seeds = sorted({run.seed for group in groups for run in group.runs})
    runs = sum(len(group.runs) for group in groups)
    names = {group.approach for group in groups}
    many = "one approach" if len(names) == 1 else f"{len(names)} approaches"
    if len(groups) > len(names):
        many += f" in {len(groups)} settings"
    lines = [f"{runs} runs of {many}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."]
    by_domain = {
        domain: {group.name: e for group in trained if (e := group.domain_delta(domain)) is not None}
        for domain in _DOMAINS
    }
    lines += [_told(by_domain[domain], where) for domain, where in _DOMAINS.items() if by_domain[domain]]
    inside, outside = by_domain["in"], by_domain["out"]
    if inside and outside:
        held = {name for name, e in inside.items() if e.low is not None and e.verdict != "loss"}
        goal = [name for name, e in outside.items() if e.verdict == "gain" and name in held]
        lines.append(
            f"Gain out of domain, and no loss in domain that the intervals can show: {', '.join(goal) or 'none'}."
        )
    if told := _apart(groups):
        lines.append(told)
    if untouched := [group.name for group in groups if group.untouched]:
        lines.append(f"Encoder not trained, so that its k-NN accuracy cannot change: {', '.join(untouched)}.")
    if few := [group.name for group in groups if len(group.runs) < 3]:
        whose = "all" if len(few) == len(groups) else ", ".join(few)
        lines.append(f"Fewer than three seeds, to be read with care: {whose}.")
    return Section("findings", "What came out", [Listed(tuple(lines))])


def what_was_run(groups: Sequence[Group], summaries: Mapping[str, str]) -> Section:
    """Return approaches, seeds, pairs and steps.

    Args:
        groups: what is compared.
        summaries: one line an approach, by name.
    """
    rows = tuple(
        (
            Cell(group.name), Cell(summaries.get(group.approach, "–")), Cell(group.preset),
            Cell(", ".join(str(run.seed) for run in group.runs)),
            Cell(f"{group.runs[0].results['captions'].get('pairs', 0):,}"),
            Cell(f"{group.runs[0].results.get('steps', 0):,}"),
        )
        for group in groups
    )  # fmt: skip
    notes: dict[str, list[str]] = {}
    for group in groups:
        for note in group.notes:
            notes.setdefault(note, []).append(group.name)
    table = Table(
        "Approaches, and the captioned pictures and optimizer steps of each run.",
        ("approach", "what it is", "preset", "seeds", "pairs", "steps"), rows, words=4,
        note=" ".join(f"{', '.join(names)}: {note}" for note, names in notes.items()),
    )  # fmt: skip
    return Section("run", "What was run", [table])


def changes(groups: Sequence[Group]) -> Section:
    """Return the table of changes against the pretrained encoder, and a figure a set."""
    sets = set_domains(groups)
    if not sets:
        return Section("changes", "Change of accuracy", [Text("No run has an evaluation set.")])
    domains = [domain for domain in _DOMAINS if domain in sets.values()]
    headers = ("approach", *(f"mean, {_DOMAINS[d]}" for d in domains), *(f"{name} ({d})" for name, d in sets.items()))
    first = [
        Cell("pretrained, accuracy in %"),
        *(Cell("") for _ in domains),
        *(_pretrained(groups, name) for name in sets),
    ]
    rows = [tuple(first)]
    for group in groups:
        cells = [change(group.domain_delta(domain)) for domain in domains]
        rows.append((Cell(group.name), *cells, *(change(group.delta(name)) for name in sets)))
    cells = sum(cell.detail.startswith("[") for row in rows[1:] for cell in row)
    table = Table(
        "Change of k-NN accuracy against the pretrained encoder, in points. " + interval_note(groups)
        + f" Protocol: {used_protocols(groups)}.",
        headers, tuple(rows),
        note="▲ gain, ▼ loss: the interval excludes 0. No mark: it does not. The interval of one seed’s mean takes the "
        f"sets as independent. Each interval stands alone: of {cells} such, about {cells / 20:.0f} would exclude 0 if "
        "nothing had changed.",
    )  # fmt: skip
    charts = tuple(changes_chart(groups, name, domain) for name, domain in sets.items())
    return Section("changes", "Change of accuracy, set by set", [table, Charts(charts)])


def in_against_out(groups: Sequence[Group]) -> Section:
    """Return the scatter of both domains with its Pareto front."""
    chart = scatter_chart(groups)
    if chart is None:
        return Section(
            "front", "At home against away", [Text("No run has both an in-domain and an out-of-domain set.")]
        )
    _, best = front(groups)
    text = (
        f"Beaten by none in both respects at once (dashed): {', '.join(best)}. The pretrained encoder is one of the "
        "points: what it beats is worse than doing nothing. The front is that of the means; where intervals overlap it "
        "may be another. Intervals that leave the picture are cut off there; its values have them whole. "
        f"Protocol: {used_protocols(comparable(groups)[0])}. {_apart(groups)}"
    ).rstrip()
    return Section("front", "At home against away", [Text(text), Charts((chart,), wide=True)])


def _apart(groups: Sequence[Group]) -> str:
    """Say whose means do not compare with the others'."""
    others = ", ".join(group.name for group in comparable(groups)[1])
    return others and f"Over other sets or by another protocol than most, so that their means do not compare: {others}."


def _pretrained(groups: Sequence[Group], name: str) -> Cell:
    entries = [run.results["knn"][name] for group in groups for run in group.runs if name in run.results["knn"]]
    values = {entry["pretrained"] for entry in entries}
    if len(values) == 1:
        value, count = entries[0]["pretrained"], max(entry.get("test", 0) for entry in entries)
        return share(of_share(value, count, "pictures") if count else over_seeds([value]))
    return Cell(f"{100 * min(values):.1f} to {100 * max(values):.1f}", "by encoder")


def _told(estimates: Mapping[str, Estimate], where: str) -> str:
    """Return how many gained and lost, by name, and of how many one cannot tell."""
    names = {verdict: [name for name, e in estimates.items() if e.verdict == verdict] for verdict in ("gain", "loss")}
    without = sum(e.low is None for e in estimates.values())
    rest = len(estimates) - len(names["gain"]) - len(names["loss"]) - without
    parts = [f"{len(found)} {word}{': ' * bool(found)}{', '.join(found)}"
             for word, found in (("gained", names["gain"]), ("lost", names["loss"]))]  # fmt: skip
    parts += [f"{rest} cannot be told from no change"] if rest else []
    parts += [f"{without} have no interval"] if without else []
    many = f"of {len(estimates)} that train the encoder"
    return f"{where[0].upper()}{where[1:]}, mean over the sets, {many}: {'; '.join(parts)}."
