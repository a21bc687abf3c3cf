"""What spectra leave in a folder: spectra.json, a picture of alpha by depth, and one of each layer's density."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wlsup.errors import WlsupError
from wlsup.evaluation.figures.saving import save_figure
from wlsup.evaluation.figures.spectra import alpha_figure, esd_figure, short_names
from wlsup.evaluation.spectra import LayerSpectrum
from wlsup.files import write_json

__all__ = ["earlier_along", "write_spectra"]


def write_spectra(
    folder: Path,
    report: Mapping[str, Any],
    columns: Mapping[str, Mapping[str, LayerSpectrum]],
    *,
    title: str = "",
    figures: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write spectra.json, last, and before it spectra.png and .svg, and spectra/<layer>.png.

    Pictures of an earlier analysis are taken away: they may be of layers that this one has not.

    Args:
        folder: where.
        report: of `spectra_report`.
        columns: the same spectra as the report's, by "before", "after", "random", then by name.
        title: of the first picture.
        figures: False writes spectra.json only.
        progress: called with (done, all) pictures.

    Raises:
        WlsupError: the folder cannot be written.
    """
    try:
        _clear(folder)
        if figures:
            _draw(folder, report, columns, title, progress)
        write_json(folder / "spectra.json", report)
    except OSError as error:
        raise WlsupError(f"Cannot write spectra to {folder}: {error.strerror}. Give another folder.") from error


def earlier_along(folder: Path, protocol: str) -> list[dict[str, Any]]:
    """Return what an earlier spectra.json says of the way through training, where it was measured alike.

    Args:
        folder: a run's.
        protocol: of the analysis that is to take it over; random orders may differ.
    """
    earlier = _earlier(folder)
    alike = str(earlier.get("protocol")).split("; random")[0] == protocol.split("; random")[0]
    return earlier.get("along", []) if alike else []


def _earlier(folder: Path) -> dict[str, Any]:
    """Return an earlier spectra.json, nothing where there is none or it is not ours."""
    try:
        report = json.loads((folder / "spectra.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and isinstance(report.get("layers"), list) else {}


def _clear(folder: Path) -> None:
    """Take away what an earlier analysis wrote, and nothing else."""
    written = [_picture(folder, layer["name"]) for layer in _earlier(folder).get("layers", [])]
    for path in (folder / "spectra", *written):
        for ending in (".png", ".svg"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
    (folder / "spectra.json").unlink(missing_ok=True)


def _picture(folder: Path, name: str) -> Path:
    """Return where a layer's picture goes, without its ending."""
    return folder / "spectra" / re.sub(r"[^\w.-]", "_", name)


def _draw(
    folder: Path,
    report: Mapping[str, Any],
    columns: Mapping[str, Mapping[str, LayerSpectrum]],
    title: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    layers = report["layers"]
    save_figure(alpha_figure(layers, title), folder / "spectra")
    names = [layer["name"] for layer in layers]
    for done, (name, short) in enumerate(zip(names, short_names(names), strict=True), start=1):
        found = {column: spectra[name] for column, spectra in columns.items() if name in spectra}
        save_figure(esd_figure(short, found), _picture(folder, name), endings=("png",))
        if progress:
            progress(done, len(names))
