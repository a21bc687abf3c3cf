"""How an approach learned: its losses, and how well pictures find their captions."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wlsup.evaluation.report.figures.style import Chart, Palette, axes, slug
from wlsup.evaluation.report.groups import Group

__all__ = ["learning_chart"]

_RECALL = "retrieval/image_to_text_R@1"
Series = Sequence[tuple[int, float]]


def learning_chart(group: Group) -> Chart | None:
    """Draw a group's losses, and held-out recall where there is a shared space; None where nothing was logged.

    Thin lines are seeds, the thick one their mean, over the steps at which every seed has a value.
    """
    losses = {name: _of(group, f"{key}/loss") for name, key in (("training", "train"), ("held out", "val"))}
    recall = _of(group, _RECALL)
    if not any(losses.values()):
        return None

    def draw(palette: Palette) -> Figure:
        many = 2 if recall else 1
        figure, drawn = axes(palette, 2.1 + 1.3 * (many - 1), many, (1.6, 1.0) if recall else None)
        panels = drawn if recall else [drawn]
        for (name, lines), colour in zip(losses.items(), (palette.second, palette.accent), strict=True):
            _lines(panels[0], lines, colour, name, 1)
        panels[0].set_ylabel("loss")
        panels[0].legend(frameon=False, labelcolor=palette.ink)
        if recall:
            _lines(panels[1], recall, palette.accent, "held-out R@1", 100)
            panels[1].set_ylabel("R@1, %")
            panels[1].set_ylim(bottom=0)
            panels[0].tick_params(labelbottom=False)
            panels[1].sharex(panels[0])
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return figure

    rows, told = [], []
    shown = {**{f"{name} loss": (lines, 1) for name, lines in losses.items()}, "held-out R@1, %": (recall, 100)}
    for name, (lines, scale) in shown.items():
        if not lines:
            continue
        first, last = ([_place(line, end)[1] * scale for line in lines] for end in (0, -1))
        step = max(_place(line, -1)[0] for line in lines)
        rows.append((name, _spread(first), _spread(last), str(step), str(len(lines))))
        told.append(f"{name} from {_mean(first):.3g} to {_mean(last):.3g}")
    return Chart(
        f"learning-{slug(group.name)}",
        f"Learning curves of {group.name}",
        f"Over {len(group.runs)} seeds, first to last value: {'; '.join(told)}.",
        draw,
        ("figure", "first, lowest to highest seed", "last, lowest to highest seed", "at step", "seeds"),
        tuple(rows),
    )


def _of(group: Group, name: str) -> list[Series]:
    return [run.series[name] for run in group.runs if run.series.get(name)]


def _lines(one: object, lines: Sequence[Series], colour: str, name: str, scale: float) -> None:
    if not lines:
        return
    mark = "o" if max(map(len, lines)) < 3 else None
    if len(lines) > 1:
        for line in lines:
            one.plot([s for s, _ in line], [scale * v for _, v in line], color=colour, linewidth=0.6, alpha=0.45)
    found = [dict(line) for line in lines]
    steps = sorted(set.intersection(*map(set, found)))
    means = [scale * _mean([line[step] for line in found]) for step in steps]
    one.plot(steps, means, color=colour, linewidth=1.7, label=name, marker=mark, markersize=4)


def _place(line: Series, end: int) -> tuple[int, float]:
    return line[end]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
