"""What a page is made of; the template knows how each is shown, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from wlsup.evaluation.report.figures.style import Chart, points
from wlsup.evaluation.report.groups import Estimate
from wlsup.evaluation.report.pictures import Picture

__all__ = ["Block", "Cell", "Charts", "Code", "Pictures", "Section", "Shown", "Table", "Text", "change", "figure", "share"]

_BASES = {
    "seeds": "over {count} seeds",
    "pictures": "over test pictures",
    "pairs": "over {count} pairs",
    "none": "one seed, no interval",
}


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Args:
        text: the figure, or words.
        detail: its interval, or what else must stand beside it.
        verdict: "gain", "loss", "unsure", "untouched", or "" for what is no change.
        link: id of the section it leads to, "" for none.
    """

    text: str
    detail: str = ""
    verdict: str = ""
    link: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column heads the rows.

    Args:
        caption: what it shows, with the protocol its figures follow.
        headers: of the columns.
        rows: cells.
        words: how many columns from the left are words, which are set to the left; figures are set to the right.
        note: below it.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: int = 1
    note: str = ""
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Charts:
    """Figures beside one another, as many as fit."""

    charts: tuple[Chart, ...]
    wide: bool = False
    kind: Literal["charts"] = "charts"


@dataclass(frozen=True)
class Shown:
    """A picture with what is said of it."""

    caption: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Pictures:
    """Pictures beside one another, under a heading of their own."""

    title: str
    shown: tuple[Shown, ...]
    small: bool = False
    kind: Literal["pictures"] = "pictures"


@dataclass(frozen=True)
class Code:
    """Text as it is typed or stored, folded away under its title."""

    title: str
    text: str
    open: bool = False
    kind: Literal["code"] = "code"


Block = Table | Text | Charts | Pictures | Code


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        key: its id.
        title: its heading.
        blocks: in order.
    """

    key: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def change(estimate: Estimate | None, *, judged: bool = True) -> Cell:
    """Return a change given as a fraction, in points, with its interval; coloured where more is better."""
    if estimate is None:
        return Cell("–", "not measured")
    return Cell(points(estimate.value), _interval(estimate, points), estimate.verdict if judged else "")


def share(estimate: Estimate | None) -> Cell:
    """Return a share given as a fraction, in %, with its interval."""
    return figure(estimate, lambda value: f"{100 * value:.1f}")


def figure(estimate: Estimate | None, form: Callable[[float], str]) -> Cell:
    """Return a figure with its interval, both written by ``form``."""
    if estimate is None:
        return Cell("–", "not measured")
    return Cell(form(estimate.value), _interval(estimate, form))


def basis(estimate: Estimate) -> str:
    """Return what an interval is over, in words."""
    return _BASES[estimate.basis].format(count=estimate.count)


def _interval(estimate: Estimate, form: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return _BASES["none"]
    return f"[{form(estimate.low)}, {form(estimate.high)}]"
