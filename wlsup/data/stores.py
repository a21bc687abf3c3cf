"""Where pictures lie: a folder, an uncompressed tar or a zip, read by name, safely, from any number of workers."""

from __future__ import annotations

import os
import posixpath
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from wlsup.data.images import UnreadableImage, is_picture
from wlsup.errors import WlsupError

__all__ = [
    "MAX_BYTES",
    "FolderStore",
    "ImageStore",
    "JoinedStore",
    "TarStore",
    "check_path",
    "clean_name",
    "escapes",
    "open_store",
]

MAX_BYTES = 1 << 28
"""Largest picture file read, in bytes; a larger one is unreadable, not a way to fill the memory."""


def clean_name(name: str) -> str:
    """Spell a picture's name one way: forward slashes, no leading ``./``; ``..`` and roots stay, to be refused."""
    return posixpath.normpath(name.strip().replace("\\", "/"))


def escapes(name: str) -> bool:
    """Say whether a clean name leads out of the folder or archive it is looked up in."""
    return name.startswith(("/", "../")) or name == ".." or name[1:3] == ":/"


class ImageStore(ABC):
    """Files by name.

    Args:
        path: the folder or archive, as messages show it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all pictures in the store, sorted."""

    @abstractmethod
    def problem(self, name: str) -> str | None:
        """Say in one line why ``name`` cannot be had ("not in ..."), or None if it is there."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of the file ``name``.

        Raises:
            UnreadableImage: if it is not there, refused, or cannot be read.
        """

    def exists(self, name: str) -> bool:
        """Say whether ``name`` can be had."""
        return self.problem(name) is None

    def problems(self, names: Iterable[str]) -> dict[str, str]:
        """Return, of many names, those that cannot be had, and why."""
        return {name: reason for name in names if (reason := self.problem(name)) is not None}


class FolderStore(ImageStore):
    """Pictures in a folder and the folders below it; names are relative to it and may not lead out of it."""

    def names(self) -> list[str]:
        """Return the names of all pictures below the folder, sorted."""
        found = []
        for folder, _, files in os.walk(self.path, followlinks=True):
            prefix = Path(folder).relative_to(self.path).as_posix()
            found += [file if prefix == "." else f"{prefix}/{file}" for file in files if is_picture(file)]
        return sorted(found)

    def problem(self, name: str) -> str | None:
        """Say why ``name`` cannot be had: it leads out of the folder, or is not there."""
        name = self._relative(name)
        if escapes(name):
            return f"refused: the name leads out of {self.path}"
        return None if os.path.isfile(os.path.join(self.path, name)) else f"not in {self.path}"

    def problems(self, names: Iterable[str]) -> dict[str, str]:
        """Return those that cannot be had; each folder is listed once, which on shared file systems is far cheaper."""
        listed: dict[str, set[str]] = {}
        found = {}
        for name in names:
            clean = self._relative(name)
            folder, _, file = clean.rpartition("/")
            if escapes(clean):
                found[name] = f"refused: the name leads out of {self.path}"
                continue
            if folder not in listed:
                try:
                    with os.scandir(os.path.join(self.path, folder)) as entries:
                        listed[folder] = {entry.name for entry in entries if entry.is_file()}
                except OSError:
                    listed[folder] = set()
            if file not in listed[folder]:
                found[name] = f"not in {self.path}"
        return found

    def read(self, name: str) -> bytes:
        """Return the content of the file ``name``; Raises `UnreadableImage` as the base class says."""
        name = self._relative(name)
        if escapes(name):
            raise UnreadableImage(f"refused: the name leads out of {self.path}")
        try:
            with open(os.path.join(self.path, name), "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise UnreadableImage(error.strerror or type(error).__name__) from error
        if len(data) > MAX_BYTES:
            raise UnreadableImage(f"more than {MAX_BYTES:,} bytes")
        return data

    def _relative(self, name: str) -> str:
        """Turn an absolute name below the folder into a relative one; leave any other as it is."""
        name = clean_name(name)
        root = os.path.abspath(self.path).replace("\\", "/").rstrip("/") + "/"
        return name[len(root) :] if name.startswith(root) else name


class TarStore(ImageStore):
    """Pictures in an uncompressed tar, read in place: nothing is ever extracted.

    The headers are walked once, here; `read` then seeks by offset. Reads use ``pread``, which moves no shared file
    position, so that forked workers may share the open file; a pickled store opens its own.

    Args:
        path: the archive.

    Attributes:
        refused: members that are no plain files below the root (links, devices, absolute or ``..`` names) and why.

    Raises:
        WlsupError: if the file is missing, compressed, no tar, or truncated.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.refused: dict[str, str] = {}
        self._members: dict[str, tuple[int, int]] = {}
        self._file: int | None = None
        self._index()

    def names(self) -> list[str]:
        """Return the names of all pictures in the archive, sorted."""
        return sorted(name for name in self._members if is_picture(name))

    def members(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield every admitted member's name and (offset, size), in the archive's order."""
        yield from self._members.items()

    def problem(self, name: str) -> str | None:
        """Say why ``name`` cannot be had: it was refused, or is not there."""
        name = clean_name(name)
        if name in self._members:
            return None
        return self.refused.get(name, f"not in {self.path}")

    def read(self, name: str) -> bytes:
        """Return the content of the member ``name``; Raises `UnreadableImage` as the base class says."""
        reason = self.problem(name)
        if reason is not None:
            raise UnreadableImage(reason)
        offset, size = self._members[clean_name(name)]
        if size > MAX_BYTES:
            raise UnreadableImage(f"{size:,} bytes, more than {MAX_BYTES:,}")
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            data = os.pread(self._file, size, offset)
        except OSError as error:
            raise UnreadableImage(error.strerror or type(error).__name__) from error
        if len(data) != size:
            raise UnreadableImage(f"{len(data)} of {size} bytes: {self.path} has become shorter")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)

    def _index(self) -> None:
        try:
            with open(self.path, "rb") as file:
                if file.read(2) == b"\x1f\x8b":
                    raise WlsupError(
                        f"{self.path} is gzip-compressed, so its pictures cannot be read in random order. "
                        f"Decompress it first (gunzip {self.path.name}); pictures are compressed already."
                    )
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    for member in archive:
                        self._admit(member)
                    end = archive.offset
                file.seek(end)
                marker = file.read(tarfile.BLOCKSIZE)
        except FileNotFoundError:
            raise WlsupError(f"No such archive: {self.path}. Check the path.") from None
        except (OSError, tarfile.TarError) as error:
            raise self._broken(f"{type(error).__name__}: {error}") from error
        if marker != bytes(tarfile.BLOCKSIZE):
            # tarfile stops silently here, and leaves out whatever came after
            raise self._broken("no end-of-archive mark" if len(marker) < tarfile.BLOCKSIZE else "a header is corrupt")

    def _admit(self, member: tarfile.TarInfo) -> None:
        name = clean_name(member.name)
        if member.isdir():
            return
        if escapes(name):
            self.refused[name] = "refused: the archive gives it an absolute path or one with '..'"
        elif member.issym() or member.islnk():
            self.refused[name] = "refused: a link in the archive, not a file"
        elif not member.isreg() or member.issparse():
            self.refused[name] = "refused: neither a plain file nor a folder in the archive"
        else:
            self._members[name] = (member.offset_data, member.size)  # of two members of one name the last counts
            self.refused.pop(name, None)

    def _broken(self, why: str) -> WlsupError:
        return WlsupError(
            f"{self.path} is truncated or damaged after {len(self._members):,} files ({why}). "
            "Copy or download it again, and compare its size or checksum with the original's."
        )


class JoinedStore(ImageStore):
    """Several stores as one; a name is that of its store's file or folder, a slash, and the name inside.

    Args:
        stores: at least one; their paths' last parts must differ.

    Raises:
        WlsupError: if two paths end alike.
    """

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        super().__init__(Path(", ".join(str(store.path) for store in stores)))
        self._stores = {store.path.name: store for store in stores}
        if len(self._stores) != len(stores):
            raise WlsupError(f"Two of {self.path} have the same name; rename one, since keys are made from the names.")

    def names(self) -> list[str]:
        """Return the names of all pictures in all stores, sorted."""
        return sorted(f"{label}/{name}" for label, store in self._stores.items() for name in store.names())

    def problem(self, name: str) -> str | None:
        """Say why ``name`` cannot be had."""
        label, _, rest = name.partition("/")
        store = self._stores.get(label)
        return f"not in {self.path}" if store is None else store.problem(rest)

    def read(self, name: str) -> bytes:
        """Return the content of the file ``name``; Raises `UnreadableImage` as the base class says."""
        label, _, rest = name.partition("/")
        if label not in self._stores:
            raise UnreadableImage(f"not in {self.path}")
        return self._stores[label].read(rest)


def check_path(path: str | Path | None, option: str) -> None:
    """Refuse a path that was given as ``option`` and leads nowhere; Raises `WlsupError` naming both."""
    if path is not None and not Path(path).expanduser().exists():
        raise WlsupError(f"{option}: no such file or folder: {path}. Looked in {Path.cwd()}; give a path that exists.")


def open_store(path: str | Path, option: str = "images") -> ImageStore:
    """Open a folder, a tar or a zip of pictures.

    Args:
        path: a folder, or a file ending in ``.tar`` or ``.zip``.
        option: the setting that gave the path, as messages name it.

    Raises:
        WlsupError: if the path does not exist, or is none of the three, or the archive is damaged.
    """
    check_path(path, option)
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderStore(path)
    if path.suffix.lower() in {".tar", ".gz", ".tgz"}:
        return TarStore(path)
    if path.suffix.lower() == ".zip":
        from wlsup.data.zips import ZipStore  # here: it is built on this module

        return ZipStore(path)
    raise WlsupError(
        f"{option}: {path} is neither a folder nor a .tar or .zip. Allowed: a folder of pictures, or an archive of "
        "them: .tar (uncompressed) or .zip."
    )
