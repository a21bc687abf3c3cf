"""Pictures of spectra: each layer's eigenvalues with the fitted tail, and alpha over depth before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wlsup.evaluation.spectra import SMALLEST, LayerSpectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["alpha_figure", "esd_figure", "short_names"]

# Okabe & Ito's colours, told apart by colour-blind readers, and in print by the marker
_COLOURS = {"before": "#0072B2", "after": "#D55E00", "random": "#8A8A8A"}
_LABELS = {"before": "before (pretrained)", "after": "after (trained)", "random": "random, same shape"}
_MARKERS = {"before": "o", "after": "s", "random": "x"}
_FILLS = {"before": "none", "after": _COLOURS["after"], "random": "none"}  # what lies under another shows


def alpha_figure(layers: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Draw alpha by depth, with its standard error, before and after; below it the layers without a power law.

    Args:
        layers: of spectra.json, in order.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    # before and after first; random ones, which mostly have no power law, last
    columns = [c for c in ("before", "after", "random") if any(layer.get(c) for layer in layers)]
    names = short_names([layer["name"] for layer in layers])
    figure = Figure(figsize=(max(7.0, 2.5 + 0.19 * len(layers)), 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 0.6 + 0.3 * len(columns)])
    places = np.arange(len(layers))
    upper.axhspan(2, 6, color="#009E73", alpha=0.08, lw=0)
    shift = 0.18
    for order, column in enumerate(columns):
        offset = shift * (order - (len(columns) - 1) / 2)
        metrics = [layer.get(column) for layer in layers]
        fitted = [i for i, m in enumerate(metrics) if m and m["power_law"]]
        none = [i for i, m in enumerate(metrics) if m and not m["power_law"]]
        style = {"color": _COLOURS[column], "marker": _MARKERS[column], "mfc": _FILLS[column]}
        if fitted:
            alphas, errors = (np.array([metrics[i][key] for i in fitted]) for key in ("alpha", "sigma"))
            upper.errorbar(
                places[fitted] + offset, alphas, yerr=errors, ls="", ms=4.5, lw=0.9, label=_LABELS[column], **style
            )
        else:
            upper.plot([], [], ls="", ms=4.5, label=f"{_LABELS[column]}: none has a power law", **style)
        lower.plot(places[none] + offset, np.full(len(none), len(columns) - 1 - order), ls="", ms=4, **style)
    upper.set_ylabel("alpha, with its standard error")
    upper.set_title(title or "Exponent of each layer's spectrum", loc="left", fontsize=11)
    upper.annotate(
        "2 to 6: well trained, by WeightWatcher's guide",
        (0.995, 0.02),
        xycoords="axes fraction",
        ha="right",
        fontsize=8,
        color="#00664B",
    )
    handles, labels = upper.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: list(_LABELS).index(labels[i].split(" ")[0].rstrip(",")))
    named = [handles[i] for i in order], [labels[i] for i in order]
    upper.legend(*named, fontsize=8, frameon=False, loc="upper left", ncols=len(columns))
    low, high = upper.get_ylim()
    upper.set_ylim(min(low, 1.5), max(high * 1.08, 6.5))
    lower.set_yticks(range(len(columns)), list(reversed(columns)), fontsize=8)
    lower.set_ylim(-0.6, len(columns) - 0.4)
    lower.set_title("no power law", loc="left", fontsize=9)
    lower.set_xticks(places, names, rotation=90, fontsize=7)
    lower.set_xlim(-0.8, len(layers) - 0.2)
    for axes in (upper, lower):
        axes.grid(axis="x", color="#DDDDDD", lw=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def esd_figure(name: str, spectra: Mapping[str, LayerSpectrum]) -> Figure:
    """Draw one layer's empirical spectral density on log-log axes, with the fitted tail where there is a power law.

    Left the density of the eigenvalues, in bins of equal width on the log axis; right the share of eigenvalues at or
    above each, in which a power law's tail is a straight line and nothing depends on bins.

    Args:
        name: of the layer.
        spectra: by "before", "after", "random"; those that there are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.9))  # laid out by hand: there are many of these, and the engine takes half the time
    figure.subplots_adjust(left=0.08, right=0.985, bottom=0.14, top=0.9, wspace=0.22)
    density, survival = figure.subplots(1, 2)
    positive = {
        column: spectra[column].eigenvalues[spectra[column].eigenvalues > SMALLEST]
        for column in ("random", "before", "after")
        if column in spectra
    }
    positive = {column: values for column, values in positive.items() if len(values)}
    for column, values in positive.items():
        _draw_esd(density, survival, column, values, spectra[column].metrics)
    density.set(xlabel="eigenvalue of $W^T W$", ylabel="density")
    survival.set(xlabel="eigenvalue of $W^T W$", ylabel="share of eigenvalues at or above")
    for axes in (density, survival):
        axes.spines[["top", "right"]].set_visible(False)
        if positive:
            axes.set(xscale="log", yscale="log")
        else:
            axes.text(0.5, 0.5, "no eigenvalue above 1e-5", ha="center", transform=axes.transAxes)
    if positive:
        survival.set_ylim(bottom=0.5 / max(len(values) for values in positive.values()))
        handles, labels = survival.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: list(_LABELS).index(labels[i].split(":")[0]))
        named = [handles[i] for i in order], [labels[i] for i in order]
        survival.legend(*named, fontsize=8, frameon=False, loc="lower left")
    figure.suptitle(name, x=0.01, ha="left", fontsize=11)
    return figure


def _draw_esd(density: Axes, survival: Axes, column: str, values: np.ndarray, metrics: Mapping[str, Any]) -> None:
    values = np.sort(values)
    colour, count = _COLOURS[column], len(values)
    low, high = values[0], values[-1]
    edges = np.geomspace(low, high * (1 + 1e-9), max(8, min(40, count // 4))) if high > low else [0.9 * low, 1.1 * low]
    heights, edges = np.histogram(values, bins=edges, density=True)
    density.stairs(np.where(heights > 0, heights, np.nan), edges, color=colour, lw=1.2)
    said = f"{column}: no power law"
    if metrics["power_law"]:
        said = (
            f"{column}: alpha {metrics['alpha']:.2f} ± {metrics['sigma']:.2f}, D {metrics['D']:.3f}, "
            f"tail {metrics['tail']}"
        )
    share = 1 - np.arange(count) / count
    survival.plot(
        values, share, ls="", marker=_MARKERS[column], ms=3.5, mew=0.8, color=colour, mfc=_FILLS[column], label=said
    )
    if metrics["power_law"]:
        x = np.geomspace(metrics["xmin"], high, 50)
        tail, alpha, xmin = metrics["tail"] / count, metrics["alpha"], metrics["xmin"]
        survival.plot(x, tail * (x / xmin) ** (1 - alpha), color=colour, lw=1.4, ls="--")
        density.plot(x, tail * (alpha - 1) / xmin * (x / xmin) ** -alpha, color=colour, lw=1.4, ls="--")
        for axes in (density, survival):
            axes.axvline(xmin, color=colour, lw=0.7, alpha=0.6)


def short_names(names: Sequence[str]) -> list[str]:
    """Return names as people read them: without what stands before an encoder's own."""
    return [name.rpartition("backbone.")[2] for name in names]
