"""Unpacking a downloaded archive: nothing lands outside the folder, nothing half-done is left, no bomb goes off."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from wlsup.data.stores import clean_name, escapes  # one rule for what a name may be, in a store and here
from wlsup.errors import WlsupError

__all__ = ["unpack"]

MAX_RATIO = 100
"""Unpacked over packed size above which an archive is a bomb; JSON reaches 10, pictures 1."""

MAX_FILES = 5_000_000
_ALWAYS_ALLOWED = 64 << 20
_BLOCK = 1 << 20

_Member = tuple[str, int, Callable[[], IO[bytes]]]


def unpack(
    archive: Path, folder: Path, report: Callable[[int, int | None], None] = lambda done, total: None
) -> list[str]:
    """Unpack a tar (compressed or not) or a zip into ``folder``.

    The files are written to a hidden folder beside their place and moved there at the end, so that a folder that is
    there is whole. Modes, owners and dates are not taken over.

    Args:
        archive: the file.
        folder: where its top-level folders shall lie.
        report: called with (bytes written, bytes in all or None).

    Returns:
        What was left out, "name: why": links, devices and the like.

    Raises:
        WlsupError: if the archive is damaged, encrypted, a bomb, or gives a name outside the folder; then nothing of
            it is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    room = MAX_RATIO * archive.stat().st_size + _ALWAYS_ALLOWED
    workplace = Path(tempfile.mkdtemp(dir=folder, prefix=".unpacking-"))
    left_out: list[str] = []
    try:
        written = 0
        for files, (name, size, opened) in enumerate(_members(archive, left_out), start=1):
            if written + size > room or files > MAX_FILES:
                raise _refused(archive, f"it would unpack to more than {room:,} bytes or {MAX_FILES:,} files")
            if size > shutil.disk_usage(folder).free:
                raise WlsupError(f"The disk of {folder} is full: {name} needs {size:,} bytes. Free some.")
            place = workplace / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with opened() as source, open(place, "wb") as target:
                while block := source.read(_BLOCK):
                    written += len(block)
                    if written > room:
                        raise _refused(archive, f"it unpacks to more than {room:,} bytes")
                    target.write(block)
                    report(written, None)
        _move(workplace, folder)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # RuntimeError: an encrypted zip; NotImplementedError: a compression this Python has not
        raise _refused(archive, f"damaged, or not to be read: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise WlsupError(f"{archive} cannot be unpacked into {folder}: {error}. Check the disk.") from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return left_out


def _members(archive: Path, left_out: list[str]) -> Iterator[_Member]:
    """Yield (clean name, size, opener) of the plain files, in the archive's order."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                name = _checked(archive, info.filename)
                mode = info.external_attr >> 16
                if info.is_dir():
                    continue
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                    left_out.append(f"{name}: a link or device, not a file")
                    continue
                yield name, info.file_size, lambda info=info: file.open(info)
        return
    with tarfile.open(archive, "r:*") as file:
        for member in file:
            name = _checked(archive, member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                left_out.append(f"{name}: a link or device, not a file")
                continue
            yield name, member.size, lambda member=member: file.extractfile(member)


def _checked(archive: Path, given: str) -> str:
    name = clean_name(given)
    if escapes(name):
        raise _refused(archive, f"it holds {given!r}, which would land outside the folder")
    return name


def _refused(archive: Path, why: str) -> WlsupError:
    return WlsupError(f"{archive} is refused: {why}. Nothing of it was kept; delete it and get it from its publisher.")


def _move(workplace: Path, folder: Path) -> None:
    """Move what was unpacked to its place: whole folders where they are new, file by file where they are not."""
    for item in sorted(os.listdir(workplace)):
        source, target = workplace / item, folder / item
        if not target.exists():
            os.replace(source, target)
        elif source.is_dir() and target.is_dir():
            _move(source, target)
        elif source.is_dir() or target.is_dir():
            raise WlsupError(f"{target} is in the way: a folder where there should be a file, or a file. Move it away.")
        else:
            os.replace(source, target)
