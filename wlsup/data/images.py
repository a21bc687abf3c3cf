"""Reading one picture, whatever its format, into uint8 RGB; or saying in one line why it cannot be read."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

__all__ = [
    "MAX_ASPECT",
    "MAX_PIXELS",
    "PICTURE_SUFFIXES",
    "UnreadableImage",
    "check_size",
    "decode_rgb",
    "is_picture",
    "read_rgb",
    "strict_about_truncation",
]

MAX_PIXELS = 89_478_485
"""Largest picture decoded, in pixels: where Pillow itself starts to warn of a decompression bomb (256 MiB as RGB)."""

MAX_ASPECT = 100.0
"""Longest side over shortest: resizing the short side of a 100,000 x 1 strip would make the long one a bomb."""

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2"}
)

# An allow-list: Pillow's other openers are rare in data sets, and some (EPS) start another program. Which of these
# Pillow was built with differs (AVIF, JPEG 2000).
Image.init()
_FORMATS = tuple(
    kind for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000") if kind in Image.OPEN
)


class UnreadableImage(Exception):  # noqa: N818  (what it is, not what to do about it)
    """A picture that cannot be read; the data modules skip it, count it and name it.

    Args:
        reason: one line that says why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_picture(name: str) -> bool:
    """Say whether a file's name is that of a picture; macOS's ``._x.jpg`` shadow files are not."""
    path = Path(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith("._")


def read_rgb(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read a picture file; arguments and result as `decode_rgb`.

    Raises:
        UnreadableImage: if the file cannot be opened or decoded.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror or type(error).__name__) from error
    return decode_rgb(data, max_pixels=max_pixels)


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a picture file's bytes to RGB.

    EXIF rotation is applied; of an animation the first frame is taken; transparency is laid over white; 16-bit depths
    are scaled (not clipped) to 8 bits; grey, palette and CMYK pictures are converted.

    Args:
        data: the file's content.
        max_pixels: refuse pictures with more pixels, before they are decoded.

    Returns:
        (3, H, W) uint8, in channels-last memory order, which torch's uint8 resize is fastest on.

    Raises:
        UnreadableImage: if the data is empty, truncated, corrupt, too large, too elongated or of no known format.
    """
    if not data:
        raise UnreadableImage("zero bytes")
    try:
        with warnings.catch_warnings(), strict_about_truncation():
            warnings.simplefilter("ignore")  # Pillow warns of bombs and odd EXIF: both are handled here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                check_size(*picture.size, max_pixels)
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
                pixels = np.array(_to_rgb(picture))
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage(f"not a picture of a known format ({len(data)} bytes)") from None
    except Exception as error:  # Pillow's plugins raise anything, from struct.error to KeyError, on corrupt files
        detail = " ".join(str(error).split())
        raise UnreadableImage(f"{type(error).__name__}: {detail}" if detail else type(error).__name__) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def strict_about_truncation() -> Iterator[None]:
    """Undo, while decoding, another library's order to accept truncated pictures (grey below the cut)."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse, by its stated size, a picture that would be too large or too elongated; Raises `UnreadableImage`."""
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, above the limit of {max_pixels:,}")
    if min(width, height) < 1:
        raise UnreadableImage(f"{width} x {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage(f"{width} x {height} pixels, more elongated than {MAX_ASPECT:g}:1")


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB (`Image.convert` alone clips 16 bits and lets hidden colours show)."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        return _grey(_from_16_bits(np.asarray(picture)))
    if picture.mode == "F":
        return _grey(_from_float(np.asarray(picture)))
    if picture.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in picture.info:
        coloured = picture.convert("RGBA")
        canvas = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, coloured).convert("RGB")
    return picture.convert("RGB")


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise UnreadableImage(f"integer pixels in [{low}, {high}], outside 16 bits")
    return ((values.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)


def _from_float(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # also true of NaN
        raise UnreadableImage(f"floating-point pixels in [{low:g}, {high:g}], neither [0, 1] nor [0, 255]")
    return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).convert("RGB")
