"""spectra.json as a person reads it in a terminal: a row a layer, and what it comes to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from wlsup.evaluation.figures.spectra import short_names

__all__ = ["print_spectra", "summary_lines"]


def print_spectra(report: Mapping[str, Any], title: str) -> None:
    """Print the table, what was left out, and the summary, to standard output.

    Args:
        report: of `spectra_report`.
        title: above it.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    layers = report["layers"]
    compares = any(layer["before"] for layer in layers)
    spikes = any(layer["after"] and layer["after"]["num_spikes"] is not None for layer in layers)
    random = "random" in layers[0] if layers else False
    table = Table(title=escape(title), title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    headers = ["layer", "shape"]
    headers += ["alpha before", "alpha after"] if compares else ["alpha"]
    headers += ["alpha random"] if random else []
    headers += ["D", "tail", "weighted", "log norm", "rand. distance", *(["spikes"] if spikes else []), "no power law"]
    for header in headers:
        left = header in ("layer", "no power law")
        table.add_column(header, justify="left" if left else "right", no_wrap=True)
    for layer, name in zip(layers, short_names([layer["name"] for layer in layers]), strict=True):
        after = layer["after"]
        cells = [escape(name), f"{layer['shape'][0]}x{layer['shape'][1]}"]
        cells += [*([_alpha(layer["before"])] if compares else []), _alpha(after)]
        cells += [_alpha(layer["random"])] if random else []
        cells += [_figure(after["D"], 3), _figure(after["tail"], 0), _figure(after["alpha_weighted"], 2)]
        cells += [_figure(after["log_norm"], 2), _figure(after["rand_distance"], 3)]
        cells += [_figure(after["num_spikes"], 0)] if spikes else []
        table.add_row(*cells, (after["why"] or "").split(":")[0], style="" if after["power_law"] else "dim")
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    for line in summary_lines(report):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the summary in words, the protocol last."""
    lines = []
    for column in ("before", "after", "random"):
        part = report["summary"].get(column)
        if part is None:
            continue
        alpha = part["alpha"]
        said = f"{column}: {part['power_law']} of {part['layers']} layers have a power law"
        if alpha is not None:
            interval = f" [{alpha['ci95'][0]:.2f}, {alpha['ci95'][1]:.2f}]" if alpha["ci95"] else ""
            said += f"; mean alpha {alpha['mean']:.2f}{interval}, median {part['alpha_median']:.2f}"
            said += f"; below 2: {part['over_trained']}, above 6: {part['under_trained']}"
        lines.append(said)
    change = report["summary"]["change"]
    if change["alpha"] is not None:
        alpha = change["alpha"]
        interval = f" [{alpha['ci95'][0]:+.3f}, {alpha['ci95'][1]:+.3f}]" if alpha["ci95"] else ""
        lines.append(
            f"change of alpha, {change['layers']} layers with a power law before and after: "
            f"{alpha['mean']:+.3f}{interval}"
        )
    if any("[" in line for line in lines):
        lines.append("In brackets: 95% interval of the mean, by bootstrap over layers.")
    if report["skipped"]:
        lines.append(f"not looked at: {', '.join(left['name'] for left in report['skipped'])}")
    return [*lines, report["protocol"]]


def _alpha(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "-"
    return f"{metrics['alpha']:.2f} ± {metrics['sigma']:.2f}" if metrics["power_law"] else "none"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
