"""What a JPEG's headers say before anything is decoded: its size, and how it is to be turned."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from PIL import Image

__all__ = ["JpegHeader", "has_stray_markers", "jpeg_header"]

_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive Huffman: what every decoder reads alike
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}  # lossless, arithmetic, ...
_ORIENTATION = 0x0112
# In or between scans may stand stuffed and fill bytes, restarts, tables, further scans and comments.
_STRAY = re.compile(rb"\xff[^\x00\xff\xc4\xd0-\xd7\xda\xdb\xdd\xfe]")


@dataclass(frozen=True)
class JpegHeader:
    """Size and orientation of an ordinary JPEG.

    Args:
        height: of the stored picture, in pixels, before it is turned.
        width: likewise.
        orientation: EXIF's, 1 (upright) to 8.
        scan: where in the file the picture's data begins.
    """

    height: int
    width: int
    orientation: int = 1
    scan: int = 0

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width once turned."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the headers of a JPEG.

    Args:
        data: the file's content.

    Returns:
        None for anything that is not an 8-bit grey or YCbCr JPEG with well-formed headers (CMYK, RGB, lossless, 12 bit,
        a rotation told by XMP, no JPEG at all): whatever decoders might treat differently is left to Pillow.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    position, frame, exif = 2, None, None
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker == 0xDA:  # the scan: headers are over
            return _header(frame, exif, position)
        if length < 2 or len(body) != length - 2 or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker in _OTHER_FRAMES:
            return None
        if marker in _FRAMES:
            if frame is not None:
                return None
            frame = body
        elif marker == 0xE1:
            if body.startswith(b"Exif\0\0"):
                if exif is not None:
                    return None
                exif = body
            elif b"Orientation" in body:
                return None
        elif marker == 0xEE and body.startswith(b"Adobe") and (len(body) < 12 or body[11] != 1):
            return None
        position += 2 + length
    return None


def has_stray_markers(data: bytes, header: JpegHeader) -> bool:
    """Say whether a marker stands where none belongs: a sign of damage that some decoders paint over in grey."""
    stray = _STRAY.search(data, header.scan)
    return stray is None or stray.group() != b"\xff\xd9" or len(data) - stray.end() > 16


def _header(frame: bytes | None, exif: bytes | None, scan: int) -> JpegHeader | None:
    if frame is None or len(frame) < 6:
        return None
    precision, height, width, components = struct.unpack(">BHHB", frame[:6])
    if precision != 8 or components not in (1, 3) or not height or not width or len(frame) != 6 + 3 * components:
        return None
    if components == 3 and bytes(frame[6::3]) == b"RGB":
        return None
    orientation = 1 if exif is None else _orientation(exif)
    return None if orientation is None else JpegHeader(height, width, orientation, scan)


def _orientation(exif: bytes) -> int | None:
    """Return the orientation as Pillow reads it, 1 where none is told; None where the EXIF data is broken."""
    try:
        tags = Image.Exif()
        tags.load(exif)
        value = tags.get(_ORIENTATION, 1)
    except Exception:  # Pillow's TIFF reader raises anything on corrupt data
        return None
    if b"Orientation" in exif:  # XMP inside EXIF
        return None
    return value if value in range(1, 9) else 1
