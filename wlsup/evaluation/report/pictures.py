"""Pictures of a run for a page: out of TensorBoard's events, and the thumbnails of classes."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

__all__ = ["Picture", "class_thumbnails", "logged_pictures", "shown"]

_QUALITY = 82
_THUMBNAIL = re.compile(r"^(helped|hurt)-(\d+)-(.*)-(\d+)\.png$")


@dataclass(frozen=True)
class Picture:
    """One picture as it lies in the page.

    Args:
        uri: ``data:`` address of it.
        width: in pixels.
        height: in pixels.
        alternative: what it shows, in words.
        step: of training, where there is one.
    """

    uri: str
    width: int
    height: int
    alternative: str
    step: int | None = None


def shown(data: bytes, alternative: str, step: int | None = None) -> Picture | None:
    """Return an encoded picture for the page, as WebP, which is a tenth of PNG here; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError):
        return None
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=_QUALITY, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(uri, *picture.size, alternative, step)


def logged_pictures(folder: Path, tag: str) -> list[tuple[int, bytes]]:
    """Return (step, encoded picture) of the first and the last picture under a tag of a run's events, if any.

    Args:
        folder: of the run.
        tag: as the callback logs it.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 1, "scalars": 1})
    events.Reload()
    if tag not in events.Tags()["images"]:
        return []
    found = sorted(events.Images(tag), key=lambda event: event.step)
    ends = found[:1] + found[1:][-1:]
    return [(event.step, event.encoded_image_string) for event in ends]


def class_thumbnails(folder: Path, name: str) -> dict[tuple[str, str], list[Path]]:
    """Return the thumbnails of a set's most helped and most hurt classes: ("helped" or "hurt", class) -> files.

    Args:
        folder: of the run.
        name: of the set.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    for file in sorted((folder / "classes" / name).glob("*.png")):
        if match := _THUMBNAIL.match(file.name):
            found.setdefault((match.group(1), match.group(3)), []).append(file)
    return found
