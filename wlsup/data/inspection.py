"""Looking closely at pictures: what is wrong with one, what is odd about it, and many of them at once."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from wlsup.data.images import MAX_ASPECT, MAX_PIXELS, UnreadableImage, decode_rgb
from wlsup.data.sources import Pictures
from wlsup.data.stores import ImageStore

__all__ = ["DecodedReader", "FileReader", "PictureFacts", "PictureReader", "StoreFiles", "inspect_all", "inspect_bytes"]

_CHUNK = 32
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


class PictureReader(Protocol):
    """Pictures by position, to be looked at; picklable."""

    def __len__(self) -> int:
        """Return their number."""
        ...

    def facts(self, index: int, min_side: int) -> PictureFacts:
        """Look at picture ``index``; one with a side shorter than ``min_side`` pixels is tiny."""
        ...

    def name(self, index: int) -> str:
        """Return the name of picture ``index``."""
        ...


class PictureFiles(Protocol):
    """Picture files by position; picklable."""

    def read(self, index: int) -> bytes:
        """Return the content of file ``index``; raise `UnreadableImage` saying why not."""
        ...

    def problem(self, index: int) -> str | None:
        """Say why file ``index`` cannot be had at all, or None."""
        ...


@dataclass
class StoreFiles:
    """Files of a store.

    Args:
        store: where they lie.
        names: as the store knows them.
    """

    store: ImageStore
    names: Sequence[str]

    def read(self, index: int) -> bytes:
        """Return the content of file ``index``; Raises `UnreadableImage` saying why not."""
        return self.store.read(self.names[index])

    def problem(self, index: int) -> str | None:
        """Say why file ``index`` cannot be had at all, or None."""
        return self.store.problem(self.names[index])


@dataclass
class FileReader:
    """Picture files, looked at one by one.

    Args:
        files: the files.
        keys: as the report shall name them.
    """

    files: PictureFiles
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        """Return the name of picture ``index``."""
        return self.keys[index]

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


@dataclass
class DecodedReader:
    """Pictures that have no file of their own (arrays, databases): only what decoding shows.

    Args:
        pictures: the pictures.
        keys: as the report shall name them.
    """

    pictures: Pictures
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        """Return the name of picture ``index``."""
        return self.keys[index]

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


def inspect_all(
    reader: PictureReader,
    *,
    workers: int = 0,
    min_side: int = 16,
    report: Callable[[int, int | None], None] = lambda done, total: None,
) -> Iterator[PictureFacts]:
    """Look at every picture; the order is that of completion.

    Args:
        reader: the pictures.
        workers: processes; 0 to work in this one. A picture that makes a process crash is a fault like any other.
        min_side: as `inspect_bytes`.
        report: called with (pictures done, pictures in all).
    """
    chunks = [range(start, min(start + _CHUNK, len(reader))) for start in range(0, len(reader), _CHUNK)]
    results = (
        ([reader.facts(index, min_side) for index in chunk] for chunk in chunks)
        if workers < 1
        else _in_processes(reader, chunks, workers, min_side)
    )
    done = 0
    for facts in results:
        done += len(facts)
        report(done, len(reader))
        yield from facts


def _in_processes(
    reader: PictureReader, chunks: Sequence[range], workers: int, min_side: int
) -> Iterator[list[PictureFacts]]:
    left = list(reversed(chunks))
    running: dict[Future[list[PictureFacts]], range] = {}
    with _pool(reader, workers) as pool:
        try:
            while left or running:
                while left and len(running) < 3 * workers:
                    future = pool.submit(_look, left[-1], min_side)  # may raise, and then the chunk must not be lost
                    running[future] = left.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    facts = future.result()
                    del running[future]
                    yield facts
            return
        except BrokenProcessPool:
            left += [chunk for future, chunk in running.items() if not _came_through(future)]
            facts = [future.result() for future in running if _came_through(future)]
    yield from facts
    # One of a few chunks killed its process. One by one, to name the picture.
    suspects = [index for chunk in left[-3 * workers :] for index in chunk]
    yield _one_by_one(reader, suspects, min_side)
    yield from _in_processes(reader, left[: -3 * workers], workers, min_side)


def _came_through(future: Future[list[PictureFacts]]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _one_by_one(reader: PictureReader, suspects: Sequence[int], min_side: int) -> list[PictureFacts]:
    facts: list[PictureFacts] = []
    while len(facts) < len(suspects):
        with _pool(reader, 1) as pool:  # a new process after each that died
            try:
                for index in suspects[len(facts) :]:
                    facts += pool.submit(_look, range(index, index + 1), min_side).result()
            except BrokenProcessPool:
                facts.append(PictureFacts(reader.name(suspects[len(facts)]), "corrupt", "crashes the decoder"))
    return facts


def _pool(reader: PictureReader, workers: int) -> ProcessPoolExecutor:
    # A fork has everything imported already; elsewhere each process imports for itself.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_adopt, initargs=(reader,))


_reader: PictureReader | None = None


def _adopt(reader: PictureReader) -> None:
    global _reader
    _reader = reader


def _look(indices: range, min_side: int) -> list[PictureFacts]:
    if _reader is None:
        raise RuntimeError("the process was not set up")
    return [_reader.facts(index, min_side) for index in indices]
