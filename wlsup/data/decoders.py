"""Decoding JPEGs fast: several libraries behind one function, all giving the same pixels, and Pillow's verdict on all.

Every decoder here wraps libjpeg with the same settings (accurate integer DCT, smooth chroma upsampling), so that the
choice among those of one kind changes the time and not one pixel: it is made by speed, among what is installed.

* Whole pictures (evaluation, and training crops that are not shrunk by half or more): pixel-equal to Pillow.
* Training crops that will be shrunk: decoded at 1/2, 1/4 or 1/8 by the DCT itself, never below the crop's final size.
  The crop's edges are snapped to the nearest of that grid. Exact enough means: against the same crop of the whole
  picture the view stays above 30 dB PSNR and its mean absolute difference below 3 of 255 levels, on photographs;
  ``decoder: pil`` gives the exact view.

Only ordinary JPEGs come here. Anything else, and anything a fast decoder objects to, goes to `decode_rgb`, so that what
is refused, and why, never depends on what is installed.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode

from wlsup.data.images import MAX_PIXELS, check_size, decode_rgb, strict_about_truncation
from wlsup.data.jpeg import JpegHeader, has_stray_markers, jpeg_header
from wlsup.data.resize import resized_crop
from wlsup.errors import WlsupError, choose

__all__ = [
    "DECODERS",
    "JpegPicture",
    "available_decoders",
    "check_decoder",
    "decode",
    "decoders_used",
    "open_picture",
    "reduction_of",
]

DECODERS = ("auto", "simplejpeg", "opencv", "torchvision", "pil_draft", "pil")
"""What ``decoder`` may be. "torchvision" and "pil" never decode at a reduced size."""

_WHOLE = ("simplejpeg", "torchvision", "opencv", "pil")  # fastest first, as benchmarks/decode.py measures them
_REDUCED = ("simplejpeg", "opencv", "pil_draft")
_LENIENT = ("opencv", "torchvision")  # they keep libjpeg's warnings of damaged data to themselves
_MODULES = {"simplejpeg": "simplejpeg", "opencv": "cv2"}

# (H, W, 3) -> (H, W, 3), by EXIF orientation, as ImageOps.exif_transpose
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}


@lru_cache(maxsize=1)
def available_decoders() -> tuple[str, ...]:
    """Return the decoders whose libraries are installed, in the order of `DECODERS`, without "auto"."""
    return tuple(
        name for name in DECODERS[1:] if name not in _MODULES or importlib.util.find_spec(_MODULES[name]) is not None
    )


def check_decoder(name: str) -> str:
    """Return ``name`` if it is a decoder that is installed.

    Raises:
        WlsupError: if it is unknown, or its library is missing.
    """
    choose("decoder", name, DECODERS)
    if name != "auto" and name not in available_decoders():
        raise WlsupError(
            f"decoder={name!r} is not installed. Here: auto, {', '.join(available_decoders())}. "
            "Install the others with `pip install wlsup[fast]`, or use auto."
        )
    return name


def decoders_used(decoder: str = "auto") -> dict[str, str]:
    """Return which decoder takes "whole" pictures and which takes the "reduced" crops of training, here and now.

    Args:
        decoder: one of `DECODERS`.
    """
    available = available_decoders()
    whole = decoder if decoder in _WHOLE else next(name for name in _WHOLE if name in available)
    if decoder in ("pil", "torchvision"):
        return {"whole": whole, "reduced": whole}
    return {
        "whole": whole,
        "reduced": next(name for name in (decoder, *_REDUCED) if name in _REDUCED and name in available),
    }


def reduction_of(height: int, width: int, size: int) -> int:
    """Return by how much a crop of ``height`` x ``width`` may be reduced and still not be below ``size``: 1, 2, 4, 8.

    libjpeg's transforms for these four are vectorised; those between them (5/8, ...) cost more than they save.
    """
    reduction = 1
    while reduction < 8 and min(height, width) // (2 * reduction) >= size:
        reduction *= 2
    return reduction


class JpegPicture:
    """A JPEG that is not decoded yet: its size is known, and only as much is decoded as a crop needs.

    Args:
        data: the file's content.
        header: of that file.
        max_pixels: as `decode_rgb`.
    """

    def __init__(self, data: bytes, header: JpegHeader, max_pixels: int = MAX_PIXELS) -> None:
        self.data = data
        self.header = header
        self.max_pixels = max_pixels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, H, W) of the upright picture."""
        return (3, *self.header.upright)

    def pixels(self, decoder: str = "auto") -> Tensor:
        """Return the whole picture.

        Args:
            decoder: one of `DECODERS`; those that reduce only are taken for "auto".

        Returns:
            (3, H, W) uint8, upright: Pillow's pixels, whatever the decoder.

        Raises:
            UnreadableImage: as `decode_rgb`.
        """
        pixels = self._decode(decoders_used(decoder)["whole"], 1)
        return decode_rgb(self.data, max_pixels=self.max_pixels) if pixels is None else pixels

    def resized_crop(
        self,
        top: int,
        left: int,
        height: int,
        width: int,
        size: int,
        interpolation: InterpolationMode,
        decoder: str = "auto",
    ) -> Tensor:
        """Cut out a box and resize it, antialiased; where it will be shrunk anyway, decode it at a reduced size.

        Args:
            top: of the box in the upright picture, in pixels; likewise the next three.
            left: see above.
            height: see above.
            width: see above.
            size: side of the result.
            interpolation: of the resize.
            decoder: one of `DECODERS`.

        Returns:
            (3, size, size) uint8.

        Raises:
            UnreadableImage: as `decode_rgb`.
        """
        reduction = 1 if decoder in ("pil", "torchvision") else reduction_of(height, width, size)
        if reduction > 1:
            pixels = self._decode(decoders_used(decoder)["reduced"], reduction)
            if pixels is not None:
                # Edge by edge to the nearest of the grid: neither is off by more than half a pixel of it.
                top, bottom, left, right = (round(edge / reduction) for edge in (top, top + height, left, left + width))
                return resized_crop(pixels, top, left, bottom - top, right - left, size, interpolation)
        return resized_crop(self.pixels(decoder), top, left, height, width, size, interpolation)

    def _decode(self, name: str, reduction: int) -> Tensor | None:
        """Decode at 1/reduction; None if the library objects, or gives a picture of another size than announced."""
        if name == "pil":
            return None
        if name in _LENIENT and has_stray_markers(self.data, self.header):
            return None
        try:
            pixels = _LIBRARIES[name](self.data, self.header, reduction)
        except Exception:  # each library has its own errors; Pillow has the last word on this picture
            return None
        if pixels is None or pixels.shape[:2] != _reduced(self.header, reduction):
            return None
        turned = _TURNS[self.header.orientation](pixels)
        if min(turned.strides) < 0:  # torch knows no negative strides
            turned = np.ascontiguousarray(turned)
        return torch.from_numpy(turned).permute(2, 0, 1)


def open_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> JpegPicture | Tensor:
    """Open a picture: an ordinary JPEG to be decoded when its crop is known, anything else decoded here.

    Args:
        data: the file's content.
        max_pixels: as `decode_rgb`.

    Raises:
        UnreadableImage: as `decode_rgb`, for what the headers tell; the rest is found in decoding.
    """
    header = jpeg_header(data)
    if header is None:
        return decode_rgb(data, max_pixels=max_pixels)
    check_size(header.width, header.height, max_pixels)
    return JpegPicture(data, header, max_pixels)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, decoder: str = "auto") -> Tensor:
    """Decode a picture as `decode_rgb` does, to the same pixels or the same refusal, in less time.

    Args:
        data: the file's content.
        max_pixels: as `decode_rgb`.
        decoder: one of `DECODERS`.

    Returns:
        (3, H, W) uint8.

    Raises:
        UnreadableImage: as `decode_rgb`.
    """
    picture = open_picture(data, max_pixels=max_pixels)
    return picture if isinstance(picture, Tensor) else picture.pixels(decoder)


def _reduced(header: JpegHeader, reduction: int) -> tuple[int, int]:
    return -(-header.height // reduction), -(-header.width // reduction)


def _simplejpeg(data: bytes, header: JpegHeader, reduction: int) -> np.ndarray:
    import simplejpeg

    if reduction == 1:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    height, width = _reduced(header, reduction)
    return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=1, strict=True)


def _opencv(data: bytes, header: JpegHeader, reduction: int) -> np.ndarray | None:
    import cv2

    flag: Any = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[reduction]
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _torchvision(data: bytes, header: JpegHeader, reduction: int) -> np.ndarray:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch wants writable memory
    return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _pil_draft(data: bytes, header: JpegHeader, reduction: int) -> np.ndarray:
    with strict_about_truncation(), Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
        # Pillow reduces as far as neither side falls below what is asked, so ask for the size rounded down.
        picture.draft(None, (max(1, header.width // reduction), max(1, header.height // reduction)))
        picture.load()
        return np.array(picture.convert("RGB"))


_LIBRARIES: dict[str, Callable[[bytes, JpegHeader, int], np.ndarray | None]] = {
    "simplejpeg": _simplejpeg,
    "opencv": _opencv,
    "torchvision": _torchvision,
    "pil_draft": _pil_draft,
}
