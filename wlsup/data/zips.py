"""Pictures in a zip, read in place by name."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from wlsup.data.images import UnreadableImage, is_picture
from wlsup.data.stores import MAX_BYTES, ImageStore, clean_name, escapes
from wlsup.errors import WlsupError

__all__ = ["ZipStore"]

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field


class ZipStore(ImageStore):
    """Pictures in a zip, as COCO and EuroSAT are published: nothing is ever extracted.

    The directory is read once, here; `read` then seeks by offset with ``pread``, so that forked workers may share the
    open file; a pickled store opens its own. Every member's checksum is verified.

    Args:
        path: the archive.

    Attributes:
        refused: members that are no plain files below the root (links, absolute or ``..`` names), are encrypted or
            packed by a rare method, and why.

    Raises:
        WlsupError: if the file is missing, no zip, or truncated.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.refused: dict[str, str] = {}
        self._members: dict[str, tuple[int, int, int, int, int]] = {}
        self._file: int | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    self._admit(member)
        except FileNotFoundError:
            raise WlsupError(f"No such archive: {path}. Check the path.") from None
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise WlsupError(
                f"{path} is no zip, or is truncated or damaged ({type(error).__name__}: {error}). "
                "Copy or download it again, and compare its size or checksum with the original's."
            ) from error

    def names(self) -> list[str]:
        """Return the names of all pictures in the archive, sorted."""
        return sorted(name for name in self._members if is_picture(name))

    def problem(self, name: str) -> str | None:
        """Say why ``name`` cannot be had: it was refused, or is not there."""
        name = clean_name(name)
        return None if name in self._members else self.refused.get(name, f"not in {self.path}")

    def read(self, name: str) -> bytes:
        """Return the content of the member ``name``; Raises `UnreadableImage` as the base class says."""
        reason = self.problem(name)
        if reason is not None:
            raise UnreadableImage(reason)
        offset, packed_size, size, method, checksum = self._members[clean_name(name)]
        if max(size, packed_size) > MAX_BYTES:
            raise UnreadableImage(f"{max(size, packed_size):,} bytes, more than {MAX_BYTES:,}")
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            header = os.pread(self._file, _LOCAL_HEADER.size, offset)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
                raise UnreadableImage(f"damaged in {self.path}: no header where the directory says")
            _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            packed = os.pread(self._file, packed_size, offset + _LOCAL_HEADER.size + name_length + extra_length)
        except OSError as error:
            raise UnreadableImage(error.strerror or type(error).__name__) from error
        data = packed if method == zipfile.ZIP_STORED else self._inflate(packed, size)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise UnreadableImage(f"damaged in {self.path}: {len(data)} of {size} bytes, or a wrong checksum")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)

    def _inflate(self, packed: bytes, size: int) -> bytes:
        try:
            # One byte more than is stated at most: a member that lies about its size is found out, not unpacked.
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
        except zlib.error as error:
            raise UnreadableImage(f"damaged in {self.path}: {error}") from error

    def _admit(self, member: zipfile.ZipInfo) -> None:
        name = clean_name(member.filename)
        if member.is_dir():
            return
        mode = member.external_attr >> 16
        if escapes(name):
            self.refused[name] = "refused: the archive gives it an absolute path or one with '..'"
        elif mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
            self.refused[name] = "refused: a link or a device in the archive, not a file"
        elif member.flag_bits & 0x1:
            self.refused[name] = "refused: encrypted"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            self.refused[name] = f"refused: packed by method {member.compress_type}, neither stored nor deflated"
        else:
            self._members[name] = (
                member.header_offset,
                member.compress_size,
                member.file_size,
                member.compress_type,
                member.CRC,
            )
            self.refused.pop(name, None)
