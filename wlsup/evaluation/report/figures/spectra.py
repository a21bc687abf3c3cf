"""The power laws of the layers' spectra, by depth, before training and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wlsup.evaluation.report.figures.style import Chart, Palette, axes, slug
from wlsup.evaluation.report.groups import Group
from wlsup.evaluation.report.runs import Run

__all__ = ["both_alphas", "spectra_chart"]


def both_alphas(run: Run) -> list[tuple[float, float]]:
    """Return (alpha before, alpha after) of the layers with a power law in both: no other layers compare."""
    pairs = [(_alpha(layer["before"]), _alpha(layer["after"])) for layer in run.spectra["layers"]]
    return [(before, after) for before, after in pairs if before is not None and after is not None]


def spectra_chart(group: Group) -> Chart | None:
    """Draw alpha of every layer that follows a power law, of the group's first run with spectra; None without one.

    Source: Martin, Peng and Mahoney 2021, "Predicting trends in the quality of state-of-the-art neural networks without
    access to training or testing data": alpha between 2 and 6 in well-trained layers.
    """
    run = next((run for run in group.runs if run.spectra.get("layers")), None)
    if run is None:
        return None
    layers: Sequence[Mapping[str, Any]] = run.spectra["layers"]
    before, after = ([_alpha(layer[when]) for layer in layers] for when in ("before", "after"))
    fits = [a for a in after if a is not None]

    def draw(palette: Palette) -> Figure:
        figure, one = axes(palette, 2.5)
        places = range(len(layers))
        one.axhspan(2, 6, color=palette.gain, alpha=0.08, linewidth=0)
        for values, name, marker, colour in (
            (before, "before", "o", palette.muted),
            (after, "after", "D", palette.accent),
        ):
            found = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
            if found:
                filled = colour if name == "after" else palette.paper
                one.plot(*zip(*found, strict=True), marker=marker, markersize=4.5, linestyle="none", color=colour,
                         markerfacecolor=filled, label=name)  # fmt: skip
        for place, (first, last) in enumerate(zip(before, after, strict=True)):
            if first is not None and last is not None:
                one.plot([place, place], [first, last], color=palette.muted, linewidth=0.8)
        one.set_xlim(-0.7, len(layers) - 0.3)
        one.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        one.set_xlabel("layer, first to last")
        one.set_ylabel("alpha")
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, labelcolor=palette.ink, ncols=2)
        return figure

    rows = tuple(
        (
            str(place), layer["name"], " × ".join(map(str, layer["shape"])), _cell(layer["before"]),
            _cell(layer["after"]), _distance(layer["after"]), (layer["after"] or {}).get("why") or "",
        )
        for place, layer in enumerate(layers)
    )  # fmt: skip
    both = both_alphas(run)
    medians = [f"{median(side):.2f}" for side in zip(*both, strict=True)]
    middle = f" Median alpha of the {len(both)} that do so before and after: {' and '.join(medians)}." if both else ""
    return Chart(
        f"spectra-{slug(group.name)}",
        f"Spectra of {group.name}, seed {run.seed}",
        f"Exponent alpha of the tail of each layer's spectrum; {len(fits)} of {len(layers)} layers follow a power law "
        f"after training, and only those are drawn. Shaded: 2 to 6, as in well-trained layers.{middle}",
        draw,
        ("layer", "name", "shape", "alpha before", "alpha after", "D after", "why none"),
        rows,
    )


def _alpha(metrics: Mapping[str, Any] | None) -> float | None:
    return metrics["alpha"] if metrics and metrics.get("power_law") else None


def _cell(metrics: Mapping[str, Any] | None) -> str:
    alpha = _alpha(metrics)
    return "none" if alpha is None else f"{alpha:.2f}"


def _distance(metrics: Mapping[str, Any] | None) -> str:
    value = (metrics or {}).get("D")
    return "" if value is None else f"{value:.3f}"
