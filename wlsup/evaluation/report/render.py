"""The page: one HTML file that asks the network for nothing and runs no script."""

from __future__ import annotations

import re
from pathlib import Path

from wlsup.evaluation.report.build import Report
from wlsup.evaluation.report.figures.style import css

__all__ = ["render"]

_HERE = Path(__file__).parent


def render(report: Report, *, version: str, created: str) -> str:
    """Return the report as HTML.

    Everything that comes out of a run is escaped by the template; beyond that the page's own policy forbids scripts and
    every address but ``data:`` pictures, so that nothing in a caption can do anything.

    Args:
        report: its content.
        version: of the suite, for the page's foot.
        created: date, as the foot shows it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def words(text: str) -> Markup:
        """Escape, set `commands` in a fixed pitch, and let long names break after their underscores."""
        safe = re.sub(r"`([^`<>]+)`", r"<code>\1</code>", str(escape(text)))
        return Markup(re.sub(r"(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])", "_<wbr>", safe))

    environment.filters["words"] = words
    environment.filters["svg"] = lambda chart: Markup(chart.svg())  # matplotlib escapes what it writes
    sheet = Markup(css() + "\n" + (_HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("template.html").render(report=report, css=sheet, version=version, created=created)
