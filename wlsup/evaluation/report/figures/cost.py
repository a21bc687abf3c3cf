"""What was gained for what it cost."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from wlsup.evaluation.report.figures.style import Chart, Palette, axes, name_rows
from wlsup.evaluation.report.groups import Group

__all__ = ["cost_chart"]


def cost_chart(groups: Sequence[Group]) -> Chart | None:
    """Draw what each approach computed for, and trains, as bars; None where no run recorded it."""
    found = [
        (group, seconds)
        for group in groups
        if (seconds := group.over_seeds(lambda run: run.cost.get("processor_seconds"))) is not None
    ]
    if not found:
        return None

    def draw(palette: Palette) -> Figure:
        figure, one = axes(palette, 0.8 + 0.22 * len(found))
        one.grid(False, axis="y")
        values = [seconds.value for _, seconds in found]
        one.barh(range(len(found)), values, color=palette.accent, height=0.62)
        for row, (group, seconds) in enumerate(found):
            each = [run.cost["processor_seconds"] for run in group.runs]
            if len(each) > 1:
                one.plot([min(each), max(each)], [row, row], color=palette.ink, linewidth=1.4)
            one.annotate(f"{seconds.value:,.0f}", (max(each), row), (5, 0), textcoords="offset points", va="center",
                         fontsize=8.5, color=palette.ink)  # fmt: skip
        name_rows(one, [group.name for group, _ in found])
        one.set_ylim(len(found) - 0.4, -0.6)
        one.margins(x=0.14)
        one.set_xlabel("core seconds")
        return figure

    rows = tuple(
        (group.name, f"{seconds.value:,.0f}", _spread([run.cost["processor_seconds"] for run in group.runs]))
        for group, seconds in found
    )
    most = max(found, key=lambda item: item[1].value)
    least = min(found, key=lambda item: item[1].value)
    return Chart(
        "cost",
        "Seconds of computing",
        f"Seconds of computing added up over cores, mean over seeds: from {least[1].value:,.0f} ({least[0].name}) to "
        f"{most[1].value:,.0f} ({most[0].name}).",
        draw,
        ("approach", "core seconds, mean", "lowest to highest seed"),
        rows,
    )


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if len(values) == 1 else f"{low:,.0f} to {high:,.0f}"
