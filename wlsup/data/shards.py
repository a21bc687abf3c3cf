"""Tar shards (webdataset, img2dataset, or our own): writing them, indexing them, and reading pictures by position."""

from __future__ import annotations

import io
import json
import os
import posixpath
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from torch import Tensor

from wlsup.data.captions import clean_caption
from wlsup.data.conceptual_captions import cc3m_image_name
from wlsup.data.decoders import JpegPicture, decode, open_picture
from wlsup.data.images import PICTURE_SUFFIXES, UnreadableImage
from wlsup.data.packed import PackedLists, StringPacker
from wlsup.data.shard_index import ShardIndex, merge_indices, save_index
from wlsup.data.stores import MAX_BYTES, TarStore, clean_name
from wlsup.errors import WlsupError
from wlsup.files import written_whole

__all__ = ["ShardPictures", "ShardSample", "build_index", "index_shard", "write_shards"]

_OPEN_FILES = 64
_MAX_TEXT = 1 << 20  # bytes of a .txt or .json read
_CAPTION_FIELDS = ("captions", "caption", "text", "TEXT", "title")


@dataclass
class ShardSample:
    """One sample to be written.

    Args:
        key: its stable name.
        data: content of the picture's file.
        suffix: of that file, such as ".jpg".
        captions: at least one.
    """

    key: str
    data: bytes
    suffix: str
    captions: Sequence[str]


def write_shards(
    samples: Iterable[ShardSample],
    folder: str | Path,
    *,
    samples_per_shard: int = 10_000,
    max_bytes: int = 1 << 30,
    progress: Callable[[int], None] | None = None,
) -> ShardIndex:
    """Write tar shards and their index.

    Members are ``000000042.jpg`` and ``000000042.json`` (``key``, ``captions``), in the order given, so that
    webdataset reads them too. The same samples give the same bytes. A shard appears under its name only when whole.

    Args:
        samples: what to write.
        folder: made if need be; it must not hold shards yet.
        samples_per_shard: at most so many in one.
        max_bytes: begin another shard once one has grown so large.
        progress: called with the number written so far.

    Raises:
        WlsupError: if the folder holds shards already, or there are no samples.
    """
    folder = Path(folder)
    if any(folder.glob("*.tar")):
        raise WlsupError(f"{folder} holds tar files already. Give an empty folder, or delete them first.")
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[ShardIndex] = []
    number, source = 0, iter(samples)
    sample = next(source, None)
    while sample is not None:
        path = folder / f"{len(parts):05d}.tar"
        begin = number
        with written_whole(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            while sample is not None and number - begin < samples_per_shard and archive.offset < max_bytes:
                _add(archive, f"{number:09d}{sample.suffix}", sample.data)
                # ASCII JSON: it carries any text, lone surrogates included
                record = {"key": sample.key, "captions": list(sample.captions), "wlsup": 1}
                _add(archive, f"{number:09d}.json", json.dumps(record).encode())
                number += 1
                if progress is not None:
                    progress(number)
                sample = next(source, None)
        parts.append(index_shard(path))
    if not parts:
        raise WlsupError(f"No samples to write into {folder}. Check the source.")
    index = merge_indices(parts)
    save_index(index, folder)
    return index


def build_index(paths: Sequence[str | Path], progress: Callable[[int, int], None] | None = None) -> ShardIndex:
    """Index tar shards; `save_index` writes the result beside them.

    Args:
        paths: the shards, all in one folder, in any order.
        progress: called with (shards done, shards in all).

    Raises:
        WlsupError: if there are none, they lie in several folders, one is truncated or damaged, or has fewer samples
            than img2dataset's own count of it (``00000_stats.json``).
    """
    shards = sorted(map(Path, paths))
    if not shards:
        raise WlsupError("There are no tar shards to index. Give a folder with files ending in .tar.")
    if len({path.parent for path in shards}) > 1:
        raise WlsupError(f"The shards lie in several folders, such as {shards[0].parent} and {shards[-1].parent}.")
    parts = []
    for number, path in enumerate(shards, start=1):
        parts.append(index_shard(path))
        if progress is not None:
            progress(number, len(shards))
    return merge_indices(parts)


def index_shard(path: str | Path) -> ShardIndex:
    """Index one shard, reading its texts; see `build_index`.

    A sample is all members of one name up to the first dot: a picture, and ``.txt`` (one caption) or ``.json`` (fields
    caption, captions or text). Its key is ``key`` in JSON of `write_shards`; else, where the JSON states a ``url``,
    `cc3m_image_name` of it, so that shards and folders of fetched pictures choose the same subset; else
    ``<shard>/<member>`` without their endings.

    Raises:
        WlsupError: if the shard is missing, truncated or damaged.
    """
    path = Path(path)
    store = TarStore(path)  # walks the headers, refuses hostile members, notices truncation
    pictures: dict[str, tuple[int, int]] = {}
    texts: dict[str, dict[str, tuple[int, int]]] = {}
    for name, place in store.members():
        stem, suffix = _split(name)
        if suffix in PICTURE_SUFFIXES:
            pictures.setdefault(stem, place)
        elif suffix in (".txt", ".json"):
            texts.setdefault(stem, {})[suffix] = place
    _compare_with_stats(path, len(pictures))
    keys, captions, places = StringPacker(), [], array("q")
    broken: dict[str, int] = {}
    if store.refused:
        broken["refused member"] = len(store.refused)
    seen: dict[str, int] = {}
    with open(path, "rb") as file:
        total = 0
        while block := file.read(2**20):
            total = crc32(block, total)
        for stem, (offset, length) in pictures.items():
            found, key = _texts(file, texts.get(stem, {}))
            key = key or f"{path.stem}/{stem}"
            if not found:
                broken["no caption"] = broken.get("no caption", 0) + 1
            if key in seen:
                captions[seen[key]] += [text for text in found if text not in captions[seen[key]]]
                continue
            seen[key] = len(captions)
            keys.append(key)
            captions.append(found)
            places.extend((offset, length))
    orphans = len(texts.keys() - pictures.keys())
    if orphans:
        broken["text without a picture"] = orphans
    offset, length = np.frombuffer(places, np.int64).reshape(-1, 2).T
    return ShardIndex(
        names=[path.name],
        sizes=np.array([path.stat().st_size], np.int64),
        keys=keys.packed(),
        captions=PackedLists.of(captions),
        shard=np.zeros(len(captions), np.int32),
        offset=offset.copy(),
        length=length.copy(),
        broken=broken,
        sums=np.array([total], np.uint32),
    )


class ShardPictures:
    """Pictures in tar shards, by position.

    Reads use ``pread``, which moves no shared file position, so that forked workers may share open files; a pickled
    object opens its own. At most 64 shards are open at a time.

    Args:
        folder: of the shards.
        index: of them.
        positions: which of the index's samples, in order; None for all.
    """

    def __init__(self, folder: str | Path, index: ShardIndex, positions: np.ndarray | None = None) -> None:
        chosen = slice(None) if positions is None else positions
        self.paths = [str(Path(folder) / name) for name in index.names]
        self.groups = index.shard[chosen]
        self._offset, self._length = index.offset[chosen], index.length[chosen]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.groups)

    def bytes_of(self, index: int) -> bytes:
        """Return the content of the picture's file; Raises `UnreadableImage` saying why not."""
        shard, offset, length = int(self.groups[index]), int(self._offset[index]), int(self._length[index])
        if length > MAX_BYTES:
            raise UnreadableImage(f"{length:,} bytes, more than {MAX_BYTES:,}")
        try:
            data = os.pread(self._open(shard), length, offset)
        except OSError as error:
            raise UnreadableImage(error.strerror or type(error).__name__) from error
        if len(data) != length:
            raise UnreadableImage(f"{len(data)} of {length} bytes: {self.paths[shard]} has become shorter")
        return data

    def read(self, index: int) -> Tensor:
        """Return picture ``index`` as (3, H, W) uint8; Raises `UnreadableImage` saying why not."""
        return decode(self.bytes_of(index))

    def open(self, index: int) -> JpegPicture | Tensor:
        """Return picture ``index``, a JPEG undecoded; Raises `UnreadableImage` saying why not."""
        return open_picture(self.bytes_of(index))

    def _open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            file = os.open(self.paths[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return file

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def _split(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as webdataset does; the ending in lower case."""
    folder, _, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return posixpath.join(folder, stem), (dot + ending.rpartition(".")[2]).lower()


def _texts(file: io.BufferedReader, places: dict[str, tuple[int, int]]) -> tuple[list[str], str | None]:
    """Return a sample's captions, those of the .json before that of the .txt, and the key it states."""
    record: Any = None
    if ".json" in places:
        try:
            record = json.loads(_content(file, *places[".json"]))
        except (ValueError, RecursionError):
            record = None
    record = record if isinstance(record, dict) else {}
    found: list[str] = []
    for field in _CAPTION_FIELDS:
        value = record.get(field)
        found = [text for item in (value if isinstance(value, list) else [value]) if (text := clean_caption(item))]
        if found:
            break
    if not found and ".txt" in places:
        text = clean_caption(_content(file, *places[".txt"]).decode("utf-8", "surrogateescape"))
        found = [text] if text else []
    key, url = record.get("key"), record.get("url")
    if "wlsup" in record and isinstance(key, str) and key:
        return found, clean_name(key)
    return found, cc3m_image_name(url) if isinstance(url, str) and url.strip() else None


def _content(file: io.BufferedReader, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(min(length, _MAX_TEXT))


def _compare_with_stats(path: Path, found: int) -> None:
    """Hold the number of pictures against what img2dataset says it wrote, where it left its statistics."""
    stats = path.with_name(f"{path.stem}_stats.json")
    try:
        expected = json.loads(stats.read_text())["successes"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(expected, int) and found < expected:
        raise WlsupError(
            f"{path} holds {found:,} pictures, and {stats.name} says {expected:,} were written: the shard is cut "
            "short. Copy or download it again."
        )


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
