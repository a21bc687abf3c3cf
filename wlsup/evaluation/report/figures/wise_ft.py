"""WiSE-FT's curve: between the pretrained weights and the fine-tuned ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from wlsup.evaluation.report.figures.style import Chart, Palette, axes, points, slug
from wlsup.evaluation.report.groups import Estimate, Group, combined, over_seeds

__all__ = ["wise_ft_chart", "wise_ft_delta"]


def wise_ft_delta(group: Group, position: int, domain: str) -> Estimate | None:
    """Return a domain's mean change at one alpha of the curve, as a fraction; None where no such set was scored.

    Args:
        group: whose runs have a curve.
        position: of the alpha.
        domain: "in" or "out".
    """
    curves = [_sets(run.wise_ft, domain) for run in group.runs if run.wise_ft]
    if not curves or not all(curves):
        return None
    means = [_mean([entry["delta"][position] for entry in sets]) for sets in curves]
    if len(means) > 1:
        return over_seeds(means)
    return combined([entry["delta"][position] for entry in curves[0]], [entry["ci95"][position] for entry in curves[0]])


def wise_ft_chart(group: Group, others: Sequence[Group]) -> Chart | None:
    """Draw a group's curve of in-domain against out-of-domain change over alpha; others' curves are grey.

    Args:
        group: the one the figure is about.
        others: for comparison.
    """
    curve = _curve(group)
    if curve is None:
        return None
    alphas, inside, outside = curve
    picked = [run.wise_ft.get("chosen_alpha") for run in group.runs if run.wise_ft]
    chosen = [alpha for alpha in picked if alpha is not None]

    def draw(palette: Palette) -> Figure:
        figure, one = axes(palette, 2.9)
        one.axhline(0, color=palette.muted, linewidth=0.8)
        one.axvline(0, color=palette.muted, linewidth=0.8)
        for other in others:
            drawn = None if other is group else _curve(other)
            if drawn:
                xs, ys = ([100 * e.value for e in line] for line in drawn[1:])
                one.plot(xs, ys, color=palette.muted, linewidth=0.7, alpha=0.5)
        xs, ys = ([100 * e.value for e in line] for line in (inside, outside))
        one.plot(xs, ys, color=palette.accent, linewidth=1.7, marker="o", markersize=3.5)
        for alpha in sorted(set(chosen)):
            place = min(range(len(alphas)), key=lambda i: abs(alphas[i] - alpha))
            one.plot(xs[place], ys[place], marker="o", markersize=11, color=palette.second, markerfacecolor="none",
                     markeredgewidth=1.6)  # fmt: skip
        for place, name in ((0, "α = 0, pretrained"), (len(alphas) - 1, "α = 1, fine-tuned")):
            right = xs[place] > (max(xs) + min(xs)) / 2
            one.annotate(name, (xs[place], ys[place]), (-7 if right else 7, 8), textcoords="offset points",
                         ha="right" if right else "left", fontsize=8.5, color=palette.ink)  # fmt: skip
        one.margins(0.12, 0.18)
        one.set_xlabel("in-domain change, points")
        one.set_ylabel("out of domain, points")
        return figure

    rows = tuple(
        (f"{alpha:g}{' (chosen)' if alpha in chosen else ''}", _cell(i), _cell(o))
        for alpha, i, o in zip(alphas, inside, outside, strict=True)
    )
    told = ", ".join(f"{alpha:g}" for alpha in chosen) or "none"
    return Chart(
        f"wise-ft-{slug(group.name)}",
        f"WiSE-FT of {group.name}",
        f"Mean change in domain (across) and out of domain (up) from the pretrained weights, α = 0, to the fine-tuned "
        f"ones, α = 1. Ringed: the α chosen on in-domain validation pictures ({told}).",
        draw,
        ("α", "in domain", "out of domain"),
        rows,
    )


def _curve(group: Group) -> tuple[list[float], list[Estimate], list[Estimate]] | None:
    scored = [run.wise_ft for run in group.runs if run.wise_ft]
    if not scored or any(one["alphas"] != scored[0]["alphas"] for one in scored):
        return None
    alphas = scored[0]["alphas"]
    lines = [[wise_ft_delta(group, place, domain) for place in range(len(alphas))] for domain in ("in", "out")]
    if any(estimate is None for line in lines for estimate in line):
        return None
    return alphas, lines[0], lines[1]


def _sets(wise_ft: Mapping[str, Any], domain: str) -> list[Mapping[str, Any]]:
    return [entry for entry in wise_ft["sets"].values() if entry["domain"] == domain]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cell(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return points(estimate.value)
    return f"{points(estimate.value)} [{points(estimate.low)}, {points(estimate.high)}]"
