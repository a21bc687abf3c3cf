"""What a page is made of; the template knows how each is shown, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from wlsup.evaluation.report.figures.style import Chart, points
from wlsup.evaluation.report.groups import Estimate
from wlsup.evaluation.report.pictures import Picture

__all__ = ["Block", "Cell", "Charts", "Code", "Listed", "Pictures", "Section", "Shown", "Table", "Text",
           "change", "figure", "number", "share"]  # fmt: skip

_NO_INTERVAL = "one seed, no interval"


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Args:
        text: the figure, or words.
        detail: its interval, or what else must stand beside it.
        verdict: "gain", "loss", "unsure", "untouched", or "" for what is no change.
        pictures: thumbnails beside it.
    """

    text: str
    detail: str = ""
    verdict: str = ""
    pictures: tuple[Picture, ...] = ()


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
class Listed:
    """Sentences that stand by themselves."""

    items: tuple[str, ...]
    kind: Literal["list"] = "list"


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
    kind: Literal["pictures"] = "pictures"


@dataclass(frozen=True)
class Code:
    """Text as it is typed or stored, folded away under its title."""

    title: str
    text: str
    open: bool = False
    kind: Literal["code"] = "code"


Block = Table | Text | Listed | Charts | Pictures | Code


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
    if estimate.verdict == "untouched":
        return Cell("0.0", "unchanged", "untouched")
    return Cell(points(estimate.value), _interval(estimate, points), estimate.verdict if judged else "")


def share(estimate: Estimate | None) -> Cell:
    """Return a share given as a fraction, in %, with its interval, which does not leave [0, 100]."""
    return figure(estimate, lambda value: number(100 * min(max(value, 0.0), 1.0), 1))


def figure(estimate: Estimate | None, form: Callable[[float], str]) -> Cell:
    """Return a figure with its interval, both written by ``form``."""
    if estimate is None:
        return Cell("–", "not measured")
    return Cell(form(estimate.value), _interval(estimate, form))


def number(value: float, digits: int, signed: bool = False) -> str:
    """Return a number with so many decimals and a true minus sign."""
    return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def _interval(estimate: Estimate, form: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return _NO_INTERVAL
    return f"[{form(estimate.low)}, {form(estimate.high)}]"
