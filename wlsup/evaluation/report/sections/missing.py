"""What the report could not show, and what makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from wlsup.evaluation.report.blocks import Cell, Section, Table, Text
from wlsup.evaluation.report.groups import Group
from wlsup.evaluation.report.runs import Run

__all__ = ["absences", "missing"]

# piece -> (whether a run has it, what makes it)
_PIECES = {
    "config.yaml": (lambda run: bool(run.config), "every `wlsup fit` writes it"),
    "plan.json": (lambda run: bool(run.plan), "every `wlsup fit` writes it"),
    "env.json": (lambda run: bool(run.environment), "every `wlsup fit` writes it"),
    "cost.json": (lambda run: bool(run.cost), "every `wlsup fit` writes it"),
    "metrics.csv": (lambda run: bool(run.series), "every `wlsup fit` writes it"),
    "TensorBoard events": (lambda run: any(run.folder.glob("events.out.tfevents.*")), "every `wlsup fit` writes them"),
    "wise_ft.json": (lambda run: bool(run.wise_ft), "`wlsup wise-ft RUN`"),
    "spectra.json": (lambda run: bool(run.spectra), "`wlsup spectra RUN`"),
    "evaluation.json": (lambda run: bool(run.evaluation), "`wlsup evaluate RUN`"),
}


def absences(runs: Sequence[Run]) -> dict[str, int]:
    """Return how many of the runs lack each piece, of those pieces that any lacks."""
    counts = {piece: sum(not has(run) for run in runs) for piece, (has, _) in _PIECES.items()}
    return {piece: count for piece, count in counts.items() if count}


def missing(groups: Sequence[Group], refused: Mapping[str, str], unfinished: Sequence[Path]) -> Section:
    """Return which runs lack what, which could not be read, and which did not finish."""
    runs = [run for group in groups for run in group.runs]
    lacking = absences(runs)
    rows = [
        (
            Cell(piece), Cell(f"{count} of {len(runs)}"),
            Cell(", ".join(group.name for group in groups if not all(map(_PIECES[piece][0], group.runs)))
                 if count < len(runs) else "all"),
            Cell(_PIECES[piece][1]),
        )
        for piece, count in lacking.items()
    ]  # fmt: skip
    told = [(str(run.folder), problem) for run in runs for problem in run.problems]
    told += list(refused.items())
    told += [(str(folder), "has no results.json: it did not finish, or is running") for folder in unfinished]
    blocks = []
    if rows:
        table = ("piece", "runs without it", "approaches", "what makes it")
        blocks.append(Table("Pieces that runs lack.", table, tuple(rows), words=4))
    if told:
        cells = tuple((Cell(folder), Cell(problem)) for folder, problem in told)
        blocks.append(Table("Files and folders that were left out.", ("where", "why"), cells, words=2))
    return Section("missing", "What is missing", blocks or [Text("Nothing: every run has every piece.")])
