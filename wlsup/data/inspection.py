"""Looking closely at a picture: what is wrong with it, and what is odd about it."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from wlsup.data.images import MAX_ASPECT, MAX_PIXELS, UnreadableImage, decode_rgb
from wlsup.data.picture_files import PictureFiles
from wlsup.data.sources import Pictures

__all__ = ["DecodedReader", "FileReader", "PictureFacts", "PictureReader", "inspect_bytes"]

_ORIENTATION = 274


@dataclass(frozen=True)
class PictureFacts:
    """What was found out about one picture.

    Args:
        name: of the picture.
        fault: kind of fault: "missing", "refused", "unreadable", "zero-byte", "truncated", "corrupt", "huge", "tiny";
            "" if there is none.
        detail: one line on the fault.
        traits: oddities that are read correctly: "cmyk", "16-bit", "palette", "animated", "exif-rotated", "grey",
            "transparent".
        size: bytes of the file.
        digest: SHA-256 of the file, or of the pixels where there is no file of its own; "" if it was not read.
    """

    name: str
    fault: str = ""
    detail: str = ""
    traits: tuple[str, ...] = ()
    size: int = 0
    digest: str = ""


class PictureReader(ABC):
    """Pictures by position, to be looked at; picklable.

    Args:
        keys: one a picture, as the report shall name it.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def facts(self, index: int, min_side: int) -> PictureFacts:
        """Look at picture ``index``; one with a side shorter than ``min_side`` pixels is tiny."""


class FileReader(PictureReader):
    """Picture files, looked at one by one.

    Args:
        files: the files.
        keys: as `PictureReader`.
    """

    def __init__(self, files: PictureFiles, keys: Sequence[str]) -> None:
        super().__init__(keys)
        self.files = files

    def facts(self, index: int, min_side: int) -> PictureFacts:
        """Look at the file of picture ``index``."""
        key = self.keys[index]
        try:
            data = self.files.read(index)
        except UnreadableImage as error:
            problem = self.files.problem(index)
            if problem is not None:
                kind = "refused" if problem.startswith("refused") else "missing"
            else:
                kind = "huge" if "more than" in error.reason else "unreadable"
            return PictureFacts(key, kind, error.reason)
        return inspect_bytes(key, data, min_side)


class DecodedReader(PictureReader):
    """Pictures that have no file of their own (arrays, databases): only what decoding shows.

    Args:
        pictures: the pictures.
        keys: as `PictureReader`.
    """

    def __init__(self, pictures: Pictures, keys: Sequence[str]) -> None:
        super().__init__(keys)
        self.pictures = pictures

    def facts(self, index: int, min_side: int) -> PictureFacts:
        """Decode picture ``index``."""
        try:
            pixels = self.pictures.read(index)
        except UnreadableImage as error:
            return PictureFacts(self.keys[index], "corrupt", error.reason)
        data = pixels.contiguous().numpy().tobytes()
        return _sized(self.keys[index], tuple(pixels.shape[-2:]), min_side, (), len(data), data)


def inspect_bytes(name: str, data: bytes, min_side: int = 16) -> PictureFacts:
    """Say what is wrong with, or odd about, a picture file.

    Args:
        name: of the picture.
        data: the file's content.
        min_side: in pixels; a picture with a shorter side is tiny.
    """
    if not data:
        return PictureFacts(name, "zero-byte", "zero bytes")
    try:
        pixels = decode_rgb(data)
    except UnreadableImage as error:
        return PictureFacts(name, _kind_of_fault(data), error.reason, size=len(data))
    return _sized(name, tuple(pixels.shape[-2:]), min_side, _traits(data), len(data), data)


def _sized(
    name: str, shape: tuple[int, ...], min_side: int, traits: tuple[str, ...], size: int, data: bytes
) -> PictureFacts:
    fault = "tiny" if min(shape) < min_side else ""
    detail = f"{shape[1]} x {shape[0]} pixels" if fault else ""
    return PictureFacts(name, fault, detail, traits, size, hashlib.sha256(data).hexdigest())


def _kind_of_fault(data: bytes) -> str:
    """Tell why decoding failed: too large by its header, cut off at its end, or broken otherwise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")) as picture:
                width, height = picture.size
    except Image.DecompressionBombError:
        return "huge"
    except Exception:  # Pillow's plugins raise anything on corrupt files
        width = height = 0
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * max(min(width, height), 1):
        return "huge"
    return "truncated" if _is_cut_off(data) else "corrupt"


def _is_cut_off(data: bytes) -> bool:
    """Say whether a file lacks the end that its format prescribes."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"GIF8"):
        return b";" not in data[-16:]
    if data.startswith(b"RIFF") and len(data) >= 8:
        return len(data) < struct.unpack("<I", data[4:8])[0] + 8
    if data.startswith(b"BM") and len(data) >= 6:
        return len(data) < struct.unpack("<I", data[2:6])[0]
    return False


def _traits(data: bytes) -> tuple[str, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as picture:  # decoded before, so of an allowed format
            found = {
                "cmyk": picture.mode == "CMYK",
                "16-bit": picture.mode.startswith("I"),
                "palette": picture.mode in {"P", "PA"},
                "grey": picture.mode in {"L", "LA", "1"},
                "transparent": picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info,
                "animated": getattr(picture, "n_frames", 1) > 1,
                "exif-rotated": picture.getexif().get(_ORIENTATION, 1) != 1,
            }
    return tuple(trait for trait, is_so in found.items() if is_so)
