"""Figures to files: PNG and SVG beside one another, whole or not at all, and the same bytes for the same figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wlsup.errors import WlsupError
from wlsup.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save_figure"]


def save_figure(figure: Figure, path: Path, endings: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write ``path`` with the endings .png (200 dots an inch) and .svg (text as text), or one of them.

    Raises:
        WlsupError: the folder cannot be written.
    """
    import matplotlib

    written = []
    try:
        for ending in endings:
            dated = {"Date": None} if ending == "svg" else {}
            place = path.with_name(f"{path.name}.{ending}")
            style = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "wlsup"})
            with written_whole(place) as file, style:
                figure.savefig(file, format=ending, dpi=200, metadata=dated)
            written.append(place)
    except OSError as error:
        raise WlsupError(f"Cannot write the picture {path}.png: {error.strerror}. Give another folder.") from error
    return written
