"""From runs to a page: sections in order, and the same as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wlsup.evaluation.report.blocks import Charts, Section
from wlsup.evaluation.report.figures.changes import front
from wlsup.evaluation.report.figures.style import Chart
from wlsup.evaluation.report.groups import Estimate, Group, group_runs
from wlsup.evaluation.report.runs import Run
from wlsup.evaluation.report.sections.changes import changes, findings, in_against_out, used_protocols, what_was_run
from wlsup.evaluation.report.sections.classes import classes
from wlsup.evaluation.report.sections.costs import cost, reproduce, trained
from wlsup.evaluation.report.sections.curves import learning, spectra, wise_ft
from wlsup.evaluation.report.sections.measured import beyond_knn, tasks
from wlsup.evaluation.report.sections.missing import absences, missing
from wlsup.evaluation.report.sections.shown import captions, reconstructions

__all__ = ["Report", "as_data", "build_report", "report_charts"]


@dataclass(frozen=True)
class Report:
    """A page's content.

    Args:
        title: of the page.
        groups: what it compares.
        sections: in order.
    """

    title: str
    groups: tuple[Group, ...]
    sections: tuple[Section, ...]


def build_report(
    runs: Sequence[Run],
    *,
    title: str | None = None,
    order: Sequence[str] = (),
    summaries: Mapping[str, str] | None = None,
    refused: Mapping[str, str] | None = None,
    unfinished: Sequence[Path] = (),
) -> Report:
    """Return the report over some runs.

    Args:
        runs: at least one.
        title: of the page; None for one made of what is compared.
        order: of the approaches.
        summaries: one line an approach, by name.
        refused: folders that could not be read, and why.
        unfinished: folders of runs without results.
    """
    groups = group_runs(runs, order)
    title = title or f"What {_subject(groups)} did to an encoder"
    sections = (
        findings(groups), changes(groups), in_against_out(groups), what_was_run(groups, summaries or {}),
        wise_ft(groups), learning(groups),
        beyond_knn(groups), tasks(groups), classes(groups), spectra(groups), reconstructions(groups), captions(groups),
        cost(groups), trained(groups), reproduce(groups), missing(groups, refused or {}, unfinished),
    )  # fmt: skip
    return Report(title, tuple(groups), sections)


def report_charts(report: Report) -> list[Chart]:
    """Return all figures of a report, in order."""
    return [
        chart
        for section in report.sections
        for block in section.blocks
        if isinstance(block, Charts)
        for chart in block.charts
    ]


def as_data(report: Report) -> dict[str, Any]:
    """Return a report's figures as plain data: each group's seeds, changes and intervals; the front; what lacks."""
    candidates, best = front(report.groups)
    return {
        "title": report.title,
        "protocol": used_protocols(report.groups),
        "groups": [_group(group) for group in report.groups],
        "pareto_front": best if len(candidates) > 1 else [],
        "missing": absences([run for group in report.groups for run in group.runs]),
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "approach": group.approach,
        "preset": group.preset,
        "seeds": [run.seed for run in group.runs],
        "folders": [str(run.folder) for run in group.runs],
        "in_domain_delta": _estimate(group.domain_delta("in")),
        "out_of_domain_delta": _estimate(group.domain_delta("out")),
        "knn": {
            name: {
                "domain": domain,
                "delta": _estimate(group.delta(name)),
                "finetuned": _estimate(group.finetuned(name)),
            }
            for name, domain in group.sets.items()
        },
        "notes": list(group.notes),
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    interval = None if estimate.low is None or estimate.high is None else [estimate.low, estimate.high]
    return {"value": estimate.value, "ci95": interval, "over": estimate.basis}


def _subject(groups: Sequence[Group]) -> str:
    approaches = list(dict.fromkeys(group.approach for group in groups))
    if len(groups) == 1:
        return groups[0].name
    if len(approaches) == 1:
        return f"{len(groups)} settings of {approaches[0]}"
    what = f"{len(approaches)} approaches"
    return what if len(approaches) == len(groups) else f"{what}, in {len(groups)} settings,"
