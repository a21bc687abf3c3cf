"""Curves: WiSE-FT between pretrained and fine-tuned weights, learning over steps, spectra over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from wlsup.evaluation.report.blocks import Cell, Charts, Section, Table, Text, change, figure
from wlsup.evaluation.report.figures.learning import learning_chart
from wlsup.evaluation.report.figures.spectra import both_alphas, spectra_chart
from wlsup.evaluation.report.figures.wise_ft import wise_ft_chart, wise_ft_delta
from wlsup.evaluation.report.groups import Estimate, Group, over_seeds
from wlsup.evaluation.report.runs import Run
from wlsup.evaluation.report.sections.changes import interval_note

__all__ = ["learning", "spectra", "wise_ft"]


def learning(groups: Sequence[Group]) -> Section:
    """Return each group's losses and held-out recall over steps."""
    charts = tuple(chart for group in groups if (chart := learning_chart(group)) is not None)
    if not charts:
        return Section("learning", "Learning curves", [Text("No run has a metrics.csv with its losses.")])
    text = (
        "Thin: each seed. Thick: their mean. Losses of different approaches are sums of different things; compare a "
        "curve with itself. R@1: how often a held-out picture’s own caption is the nearest."
    )
    return Section("learning", "Learning curves", [Text(text), Charts(charts)])


def wise_ft(groups: Sequence[Group]) -> Section:
    """Return each group's WiSE-FT curve, and what the chosen alpha gives."""
    found = [group for group in groups if any(run.wise_ft for run in group.runs)]
    title = "WiSE-FT: between pretrained and fine-tuned"
    if not found:
        return Section("wise-ft", title, [Text("No run has a WiSE-FT curve: `wlsup wise-ft RUN` makes it.")])
    charts = tuple(chart for group in found if (chart := wise_ft_chart(group, found)) is not None)
    rows = []
    for group in found:
        scored = [run for run in group.runs if run.wise_ft]
        picked = ", ".join(
            f"{run.wise_ft['chosen_alpha']:g}" for run in scored if run.wise_ft.get("chosen_alpha") is not None
        )
        rows.append((
            Cell(group.name), Cell(str(len(scored))), Cell(picked or "none"),
            *(change(_chosen(scored, group, domain)) for domain in ("in", "out")),
            *(change(wise_ft_delta(group, -1, domain)) for domain in ("in", "out")),
        ))  # fmt: skip
    protocols = sorted({str(run.wise_ft.get("protocol")) for group in found for run in group.runs if run.wise_ft})
    rules = sorted({str(run.wise_ft.get("rule")) for group in found for run in group.runs if run.wise_ft})
    counted = [replace(group, runs=tuple(run for run in group.runs if run.wise_ft)) for group in found]
    table = Table(
        "Change against the pretrained encoder, in points, at the chosen α and at α = 1. "
        f"{interval_note(counted)} Protocol: {'; '.join(protocols)}.",
        ("approach", "seeds", "chosen α", "in, chosen α", "out, chosen α", "in, α = 1", "out, α = 1"), tuple(rows),
        note=f"How α is chosen: {'; '.join(rules)}.",
    )  # fmt: skip
    return Section("wise-ft", title, [table, Charts(charts)])


def spectra(groups: Sequence[Group]) -> Section:
    """Return alpha by layer before and after."""
    charts = tuple(chart for group in groups if (chart := spectra_chart(group)) is not None)
    title = "Spectra of the layers"
    if not charts:
        return Section("spectra", title, [Text("No run has its spectra: `wlsup spectra RUN` computes them.")])
    rows = []
    for group in groups:
        scored = [run for run in group.runs if run.spectra.get("layers")]
        if scored:
            cells = [figure(_median(scored, when), lambda value: f"{value:.2f}") for when in (0, 1)]
            rows.append((Cell(group.name), Cell(str(len(scored))), *cells, Cell(_fitted(scored))))
    protocols = sorted({str(run.spectra.get("protocol")) for group in groups for run in group.runs if run.spectra})
    table = Table(
        "Median over layers of alpha, the exponent of the spectrum’s tail; over seeds mean and 95 % interval "
        "(Student’s t). Both are of the layers with a power law before and after; others are left out. "
        f"Protocol: {'; '.join(protocols)}.",
        ("approach", "seeds", "alpha before", "alpha after", "layers with a power law in both"), tuple(rows),
    )  # fmt: skip
    return Section("spectra", title, [table, Charts(charts)])


def _chosen(runs: Sequence[Run], group: Group, domain: str) -> Estimate | None:
    """Return the change at each run's own chosen alpha, over seeds."""
    per_run = []
    for run in runs:
        alphas, chosen = run.wise_ft["alphas"], run.wise_ft.get("chosen_alpha")
        if chosen is None:
            return None
        place = min(range(len(alphas)), key=lambda i: abs(alphas[i] - chosen))
        alone = Group(group.approach, group.preset, group.name, (run,))
        estimate = wise_ft_delta(alone, place, domain)
        if estimate is None:
            return None
        per_run.append(estimate)
    if len(per_run) == 1:
        return per_run[0]
    return over_seeds([estimate.value for estimate in per_run])


def _median(runs: Sequence[Run], when: int) -> Estimate | None:
    """Return the median alpha before (0) or after (1), over seeds."""
    found = [median(pair[when] for pair in pairs) for run in runs if (pairs := both_alphas(run))]
    return over_seeds(found) if found else None


def _fitted(runs: Sequence[Run]) -> str:
    """Say how many layers have a power law before and after, of how many; of several seeds from the fewest on."""
    counts = sorted({len(both_alphas(run)) for run in runs})
    layers = sorted({len(run.spectra["layers"]) for run in runs})
    return " of ".join("-".join(map(str, dict.fromkeys((ends[0], ends[-1])))) for ends in (counts, layers))
