"""WiSE-FT's curve as a picture: in domain against out of domain, and each set along alpha."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_wise_ft"]

# Okabe & Ito's colours, which the colour-blind tell apart too; each set also has a marker and a name of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_INK, _QUIET = "#222222", "#888888"


def draw_wise_ft(curve: Mapping[str, Any], title: str = "") -> Figure:
    """Draw the curve: the trade between home and away, where both have a set, and the change of each set along alpha.

    Args:
        curve: what wise_ft.json holds.
        title: above it all.
    """
    from matplotlib.figure import Figure

    home, away = curve["summary"]["in_domain"], curve["summary"]["out_of_domain"]
    panels = 2 if home and away else 1
    figure = Figure(figsize=(5.2 * panels, 4.3), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    if panels == 2:
        _draw_trade(axes[0], curve, home, away)
    _draw_sets(axes[-1], curve)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw_trade(ax: Axes, curve: Mapping[str, Any], home: Mapping[str, Any], away: Mapping[str, Any]) -> None:
    alphas = curve["alphas"]
    x, y = ([100 * value for value in part["accuracy"]] for part in (home, away))
    chosen = alphas.index(curve["chosen_alpha"])
    for position in {chosen, len(alphas) - 1} - {0}:  # those of all would hide the line; the other panel has them
        spans = [_span(part, position) for part in (home, away)]
        ax.errorbar(
            x[position], y[position], xerr=spans[0], yerr=spans[1], fmt="none", ecolor="#bbbbbb", elinewidth=1, zorder=1
        )
    ax.plot(x, y, color=_COLOURS[0], linewidth=1.6, marker="o", markersize=4.5, zorder=2)
    ends = {0: "pretrained, α = 0", len(alphas) - 1: "fine-tuned, α = 1"}
    for position, alpha in enumerate(alphas):
        said = ends.get(position, f"{alpha:g}")
        right = x[position] > (min(x) + max(x)) / 2  # so that no label leaves the picture
        place = {"xytext": (-6 if right else 6, -13 if position in ends else 6), "ha": "right" if right else "left"}
        ink = _INK if position in ends else _QUIET
        ax.annotate(
            said, (x[position], y[position]), textcoords="offset points", fontsize=8, color=ink, zorder=4, **place
        )
    ax.plot(
        x[chosen],
        y[chosen],
        marker="*",
        markersize=15,
        color=_COLOURS[1],
        markeredgecolor="white",
        linestyle="none",
        zorder=3,
        label=f"chosen on validation pictures: α = {alphas[chosen]:g}",
    )
    ax.axvline(x[0], color=_QUIET, linewidth=0.8, linestyle=":", zorder=0)
    ax.axhline(y[0], color=_QUIET, linewidth=0.8, linestyle=":", zorder=0)
    ax.margins(0.12)
    ax.set_xlabel("in domain, mean k-NN accuracy (%)")
    ax.set_ylabel("out of domain, mean k-NN accuracy (%)")
    ax.set_title("bars: 95 % interval of the change from α = 0, where chosen and at α = 1", fontsize=8.5, color=_QUIET)
    ax.legend(frameon=False, fontsize=8.5, loc="best")


def _span(part: Mapping[str, Any], position: int) -> list[list[float]]:
    """Return how far the interval of the change reaches below and above it, in points."""
    change, (low, high) = part["delta"][position], part["ci95"][position]
    return [[max(0.0, 100 * (change - low))], [max(0.0, 100 * (high - change))]]


def _draw_sets(ax: Axes, curve: Mapping[str, Any]) -> None:
    alphas = curve["alphas"]
    ax.axhline(0, color=_INK, linewidth=0.8)
    for position, (name, entry) in enumerate(curve["sets"].items()):
        colour, marker = _COLOURS[position % len(_COLOURS)], _MARKERS[position % len(_MARKERS)]
        change = [100 * value for value in entry["delta"]]
        low, high = ([100 * edge[side] for edge in entry["ci95"]] for side in (0, 1))
        ax.fill_between(alphas, low, high, color=colour, alpha=0.12, linewidth=0)
        ax.plot(
            alphas,
            change,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.5,
            linestyle="-" if entry["domain"] == "in" else "--",
            label=f"{name} ({entry['domain']})",
        )
        if "probe_delta" in entry:
            probed = [100 * value for value in entry["probe_delta"]]
            ax.plot(alphas, probed, color=colour, linewidth=1, linestyle=":", label=f"{name}, linear probe")
    ax.axvline(curve["chosen_alpha"], color=_COLOURS[1], linewidth=1, linestyle=":")
    ax.set_xlabel("α: 0 pretrained, 1 fine-tuned (dotted: chosen)")
    probes = any("probe_delta" in entry for entry in curve["sets"].values())
    ax.set_ylabel(f"change of k-NN{' and probe' * probes} accuracy (points)")
    ax.set_title("bands: 95 % interval, paired bootstrap", fontsize=8.5, color=_QUIET)
    ax.legend(frameon=False, fontsize=8.5, loc="best")
