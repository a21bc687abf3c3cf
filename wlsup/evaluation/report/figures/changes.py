"""What each approach changed: set by set, and at home against away from home."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from wlsup.evaluation.report.figures.labels import place_labels
from wlsup.evaluation.report.figures.style import Chart, Palette, axes, name_rows, points, slug
from wlsup.evaluation.report.groups import UNTOUCHED, Estimate, Group, comparable
from wlsup.evaluation.report.pareto import pareto_front

__all__ = ["PRETRAINED", "changes_chart", "front", "scatter_chart"]

PRETRAINED = "pretrained"
_MARKERS = {"gain": "^", "loss": "v", "unsure": "o", "untouched": "|"}
_WORDS = {"gain": "gain", "loss": "loss", "unsure": "unsure", "untouched": "unchanged"}


def changes_chart(groups: Sequence[Group], name: str, domain: str) -> Chart:
    """Draw every approach's change on one set with its interval.

    Args:
        groups: those that have the set.
        name: of the set.
        domain: "in" or "out".
    """
    found = [(group, group.delta(name)) for group in groups if name in group.sets]
    estimates = [estimate for _, estimate in found if estimate is not None]

    def draw(palette: Palette) -> Figure:
        figure, one = axes(palette, 0.9 + 0.21 * len(found))
        one.grid(False, axis="y")
        one.axvline(0, color=palette.ink, linewidth=1)
        for row, estimate in enumerate(estimates):
            colour = {"gain": palette.gain, "loss": palette.loss}.get(estimate.verdict, palette.muted)
            if estimate.low is not None and estimate.high is not None:
                one.plot([100 * estimate.low, 100 * estimate.high], [row, row], color=colour, linewidth=1.6)
            filled = colour if estimate.verdict in ("gain", "loss") else palette.paper
            one.plot(100 * estimate.value, row, marker=_MARKERS[estimate.verdict], markersize=5.5, color=colour,
                     markerfacecolor=filled)  # fmt: skip
        name_rows(one, [group.name for group, _ in found])
        one.set_ylim(len(found) - 0.4, -0.6)
        low, high = _reach([100 * e.value for e in estimates], [(e.low, e.high) for e in estimates])
        one.set_xlim(low, high)
        one.set_xlabel(f"change of accuracy on {name}, points")
        return figure

    rows = tuple((group.name, *_cells(estimate)) for (group, _), estimate in zip(found, estimates, strict=True))
    count = {word: sum(e.verdict == word for e in estimates) for word in _WORDS}
    where = "in domain" if domain == "in" else "out of domain"
    told = ", ".join(f"{count[word]} {_WORDS[word]}" for word in _WORDS if count[word])
    return Chart(
        f"change-{slug(name)}",
        f"Change on {name} ({where})",
        f"Change of k-NN accuracy on {name} against the pretrained encoder, in points, with 95 % intervals, for "
        f"{len(found)} rows: {told}.",
        draw,
        ("approach", "change", "95 % interval", "reads as"),
        rows,
    )


def front(groups: Sequence[Group]) -> tuple[list[tuple[str, Estimate, Estimate]], list[str]]:
    """Return (name, in-domain change, out-of-domain change) of what can be compared, and the names on the Pareto front.

    The pretrained encoder itself is one of the points: an approach that it dominates is worse than doing nothing.
    Groups whose encoder is untouched are that point, and are not told apart from it.

    Args:
        groups: in any order; of those whose means are over other sets, or by another protocol, nothing is compared.
    """
    groups, _ = comparable(groups)
    candidates = [(PRETRAINED, UNTOUCHED, UNTOUCHED)]
    for group in groups:
        inside, outside = group.domain_delta("in"), group.domain_delta("out")
        if inside is not None and outside is not None and not group.untouched:
            candidates.append((group.name, inside, outside))
    best = pareto_front([(inside.value, outside.value) for _, inside, outside in candidates])
    return candidates, [candidates[position][0] for position in best]


def scatter_chart(groups: Sequence[Group]) -> Chart | None:
    """Draw in-domain against out-of-domain change, with the Pareto front; None where no run has both domains."""
    candidates, best = front(groups)
    if len(candidates) < 2:
        return None
    spots = {name: (100 * inside.value, 100 * outside.value) for name, inside, outside in candidates}

    def draw(palette: Palette) -> Figure:
        figure, one = axes(palette, 5.0)
        one.axhline(0, color=palette.muted, linewidth=0.8)
        one.axvline(0, color=palette.muted, linewidth=0.8)
        x = _reach([x for x, _ in spots.values()], [(i.low, i.high) for _, i, _ in candidates], widen=0.12, stretch=0.2)
        y = _reach([y for _, y in spots.values()], [(o.low, o.high) for _, _, o in candidates], widen=0.12, stretch=0.2)
        one.set_xlim(*x)
        one.set_ylim(*y)
        one.fill_between([0, x[1]], 0, y[1], color=palette.gain, alpha=0.08, linewidth=0)
        one.text(x[1], y[1], "gains both ", ha="right", va="top", color=palette.gain, fontsize=9)
        # the front as what it excludes: right and above of its corners nothing lies
        corners = sorted(spots[name] for name in best)
        steps = [(x[0], corners[0][1])]
        for (left, _), (_, lower) in zip(corners, [*corners[1:], (0.0, y[0])], strict=True):
            steps += [(left, steps[-1][1]), (left, lower)]
        one.plot(*zip(*steps, strict=True), color=palette.accent, linewidth=1.2, linestyle=(0, (4, 2)))
        for name, inside, outside in candidates[1:]:
            colour = palette.accent if name in best else palette.muted
            for estimate, line in ((inside, "x"), (outside, "y")):
                if estimate.low is None or estimate.high is None:
                    continue
                span = [100 * estimate.low, 100 * estimate.high]
                at = [spots[name][1 if line == "x" else 0]] * 2
                one.plot(*((span, at) if line == "x" else (at, span)), color=colour, linewidth=0.9, alpha=0.6)
            one.plot(*spots[name], marker="o", markersize=5.5, color=colour,
                     markerfacecolor=colour if name in best else palette.paper)  # fmt: skip
        one.plot(*spots[PRETRAINED], marker="s", markersize=6, color=palette.ink)
        place_labels(
            one, spots, {name: palette.ink if name in best else palette.muted for name in spots}, palette.paper
        )
        one.set_xlabel("in-domain change, points (mean over sets)")
        one.set_ylabel("out-of-domain change, points")
        return figure

    rows = tuple(
        (name, *_cells(inside)[:2], *_cells(outside)[:2], "yes" if name in best else "no")
        for name, inside, outside in candidates
    )
    return Chart(
        "in-against-out",
        "In-domain against out-of-domain change",
        f"Each approach's mean change in domain (across) and out of domain (up), with 95 % intervals. On the Pareto "
        f"front, beaten in both respects by none: {', '.join(best)}.",
        draw,
        ("approach", "in domain", "95 % interval", "out of domain", "95 % interval", "on the front"),
        rows,
    )


def _cells(estimate: Estimate) -> tuple[str, str, str]:
    if estimate.low is None or estimate.high is None:
        return points(estimate.value), "none", _WORDS[estimate.verdict]
    return points(estimate.value), f"[{points(estimate.low)}, {points(estimate.high)}]", _WORDS[estimate.verdict]


def _reach(
    values: Sequence[float],
    intervals: Sequence[tuple[float | None, float | None]],
    widen: float = 0.08,
    stretch: float = 1.0,
) -> tuple[float, float]:
    """Return an axis' limits: all values and 0, and of the intervals at most ``stretch`` times as much beside it."""
    low, high = min([0.0, *values]), max([0.0, *values])
    span = max(high - low, 1.0)
    low_end = min([low, *(100 * a for a, _ in intervals if a is not None)])
    high_end = max([high, *(100 * b for _, b in intervals if b is not None)])
    low, high = max(low_end, low - stretch * span), min(high_end, high + stretch * span)
    margin = widen * (high - low)
    return low - margin, high + margin
