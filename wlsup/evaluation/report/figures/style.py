"""How every figure looks: its colours in light and dark, its type, and how its SVG becomes a part of a page."""

from __future__ import annotations

import hashlib
import html
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["DARK", "LIGHT", "WIDTH", "Chart", "Palette", "axes", "clean", "css", "name_rows", "points", "save", "slug"]

_NAME = 28  # letters of a row's name on one line
WIDTH = 5.0  # inches of 72 units: 360 wide, as a phone shows it, so that the type is readable there unscaled


@dataclass(frozen=True)
class Palette:
    """Colours by what they are for; all of them are told apart by shape or words as well.

    Args:
        paper: behind everything.
        panel: behind what stands out a little.
        ink: text and what matters.
        muted: secondary text, and other approaches' lines.
        rule: grid and borders, which carry no meaning alone.
        accent: the one series a figure is about.
        second: what it is compared with.
        gain: a change whose interval is above 0.
        loss: a change whose interval is below 0.
    """

    paper: str
    panel: str
    ink: str
    muted: str
    rule: str
    accent: str
    second: str
    gain: str
    loss: str


LIGHT = Palette(
    "#ffffff", "#f4f6f8", "#1a1f26", "#57606b", "#d3d9e0", "#0a5eb0", "#9a4a00", "#0f6b38", "#b3261e"
)  # fmt: skip
DARK = Palette(
    "#13161a", "#1c2127", "#e8ebef", "#a3adb8", "#3a424c", "#7ab8ff", "#f2a65e", "#6bd495", "#ff9188"
)  # fmt: skip
# Stand-ins that the page's style sheet gives its colours: no other colour in a figure looks like them.
_INLINE = Palette(*(f"#f0f0{number:02x}" for number in range(1, 10)))

_TYPE = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, in the page's own type
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@dataclass(frozen=True)
class Chart:
    """One figure and what stands for it where it cannot be seen.

    Args:
        key: file name and id: lower-case letters, digits and dashes.
        title: what it is of.
        description: what it shows, in words: read aloud in the picture's place.
        draw: palette -> the figure.
        headers: of the table of its values.
        rows: cells, as text.
    """

    key: str
    title: str
    description: str
    draw: Callable[[Palette], Figure]
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def svg(self) -> str:
        """Return the figure as an inline SVG whose colours are the page's and whose ids are its own."""
        text = _svg(self, _INLINE)
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        for name, stand_in in ((field.name, getattr(_INLINE, field.name)) for field in fields(Palette)):
            text = text.replace(stand_in, f"var(--{name})")
        text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
        text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
        text = re.sub(r'\bid="', f'id="{self.key}-', text)
        text = re.sub(r"url\(#", f"url(#{self.key}-", text)
        text = re.sub(r'href="#', f'href="#{self.key}-', text)
        view = re.search(r'viewBox="([^"]*)"', text).group(1)
        names = f"{self.key}-title {self.key}-desc"
        head = (
            f'<svg viewBox="{view}" role="img" aria-labelledby="{names}" xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink">'
            f'<title id="{self.key}-title">{html.escape(self.title)}</title>'
            f'<desc id="{self.key}-desc">{html.escape(self.description)}</desc>'
        )
        return head + re.sub(r"^<svg[^>]*>", "", text, count=1)


def save(chart: Chart, folder: Path) -> list[Path]:
    """Write a figure as PNG (300 dots an inch) and SVG, in light colours, for a paper; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{chart.key}.png", folder / f"{chart.key}.svg"]
    with rc_context({**_TYPE, "svg.hashsalt": chart.key}):
        figure = chart.draw(LIGHT)
        figure.savefig(files[0], dpi=300, facecolor=LIGHT.paper)
    files[1].write_text(_svg(chart, LIGHT), encoding="utf-8")
    return files


def axes(
    palette: Palette, height: float, rows: int = 1, heights: tuple[float, ...] | None = None
) -> tuple[Figure, Any]:
    """Return an empty figure of the house's width and its axes, one below another where there are several.

    Args:
        palette: its colours.
        height: in inches.
        rows: axes.
        heights: of the axes, relative.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    drawn = figure.subplots(rows, 1, height_ratios=heights, squeeze=False)[:, 0]
    for one in drawn:
        clean(one, palette)
    return figure, drawn[0] if rows == 1 else list(drawn)


def clean(one: Axes, palette: Palette) -> None:
    """Take from axes what says nothing, and colour the rest."""
    one.set_facecolor("none")
    for side in ("top", "right"):
        one.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        one.spines[side].set_color(palette.rule)
    one.tick_params(colors=palette.muted, labelcolor=palette.ink, length=3)
    one.grid(True, color=palette.rule, linewidth=0.6)
    one.set_axisbelow(True)
    one.xaxis.label.set_color(palette.ink)
    one.yaxis.label.set_color(palette.ink)
    one.title.set_color(palette.ink)


def name_rows(one: Axes, names: Sequence[str]) -> None:
    """Write a name beside each row, from 0 on: a long one smaller, on two lines, and cut where that is not enough.

    The figure's table has it whole.
    """
    told = [textwrap.wrap(name, _NAME, max_lines=2, placeholder=" …") for name in names]
    one.set_yticks(range(len(names)), ["\n".join(lines) for lines in told])
    for label, lines in zip(one.get_yticklabels(), told, strict=True):
        if len(lines) > 1:
            label.set(fontsize=7, linespacing=0.9)


def css() -> str:
    """Return the style sheet's colours: light ones, dark ones where the reader asks for them, light ones on paper."""

    def block(palette: Palette) -> str:
        return " ".join(f"--{field.name}: {getattr(palette, field.name)};" for field in fields(Palette))

    return (
        f":root {{ color-scheme: light dark; {block(LIGHT)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {block(DARK)} }} }}\n"
        f"@media print {{ :root {{ color-scheme: light; }} }}"
    )


def points(fraction: float) -> str:
    """Return a change as signed points, with a true minus sign; what rounds to nothing has no sign."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def slug(name: str) -> str:
    """Return a name as a part of a file's name and of an id."""
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    short = "-".join(part for part in kept.split("-") if part) or "x"
    if name.lower().replace("_", "-") == short:
        return short
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"  # two names that shorten alike stay two


def _svg(chart: Chart, palette: Palette) -> str:
    stream = io.StringIO()
    with rc_context({**_TYPE, "svg.hashsalt": chart.key}):
        figure = chart.draw(palette)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stream.getvalue()
