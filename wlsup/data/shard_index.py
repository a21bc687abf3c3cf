"""The index of a set of tar shards: where every picture lies, its key and its captions, in one file beside them.

With it shards are a map-style data set: any sample can be read at any time by one ``pread``, so that shuffling is
exact, every epoch sees every sample once whatever the number of ranks, workers and shards, and a resumed run needs no
more than a position. The index also states each shard's size and number of samples: a shard cut short is noticed
before anything is read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from wlsup.data.packed import PackedLists, PackedStrings, first_of_each
from wlsup.errors import WlsupError
from wlsup.files import written_whole

__all__ = ["INDEX_NAME", "ShardIndex", "load_index", "merge_indices", "save_index", "verify_shards"]

INDEX_NAME = "wlsup-index.npz"
VERSION = 1


@dataclass
class ShardIndex:
    """What n samples in s shards are and where they lie.

    Args:
        names: s file names of shards, relative to the index.
        sizes: (s,) int64: bytes of each shard.
        keys: n distinct keys.
        captions: n lists of captions; an empty list where a picture has none.
        shard: (n,) int32: the shard each picture lies in.
        offset: (n,) int64: where in it its content begins.
        length: (n,) int64: its bytes.
        broken: number of samples left out, by reason.
        sums: (s,) uint32: CRC-32 of each shard, which `wlsup data check` compares; None in an index of before that.
    """

    names: list[str]
    sizes: np.ndarray
    keys: PackedStrings
    captions: PackedLists
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    broken: dict[str, int]
    sums: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def counts(self) -> np.ndarray:
        """(s,) samples in each shard."""
        return np.bincount(self.shard, minlength=len(self.names))


def merge_indices(parts: Sequence[ShardIndex]) -> ShardIndex:
    """Join the indices of several shards; of samples with one key the first picture counts, with all captions.

    The samples are told apart by 128 bits of their keys' SHA-256, in arrays: of three million no key becomes a Python
    object that stays.
    """
    broken: dict[str, int] = {}
    for part in parts:
        for reason, count in part.broken.items():
            broken[reason] = broken.get(reason, 0) + count
    before = np.cumsum([0, *(len(part.names) for part in parts)])
    keys = PackedStrings.joined([part.keys for part in parts])
    captions = PackedLists.joined([part.captions for part in parts])
    whole = ShardIndex(
        names=[name for part in parts for name in part.names],
        sizes=_joined([part.sizes for part in parts]),
        keys=keys,
        captions=captions,
        shard=_joined([part.shard + first for part, first in zip(parts, before, strict=False)]).astype(np.int32),
        offset=_joined([part.offset for part in parts]),
        length=_joined([part.length for part in parts]),
        broken=broken,
        sums=_joined_sums(parts),
    )
    first = first_of_each(keys)
    kept = np.flatnonzero(first == np.arange(len(first)))
    if len(kept) == len(first):
        return whole
    return replace(
        whole,
        keys=keys.take(kept),
        captions=_united(captions, first, kept),
        shard=whole.shard[kept],
        offset=whole.offset[kept],
        length=whole.length[kept],
    )


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _joined_sums(parts: Sequence[ShardIndex]) -> np.ndarray | None:
    sums = [part.sums for part in parts]
    return None if any(own is None for own in sums) else np.concatenate([np.zeros(0, np.uint32), *sums])


def _united(captions: PackedLists, first: np.ndarray, kept: np.ndarray) -> PackedLists:
    """Give each kept sample its own captions and then those of its repetitions, each text once."""
    owner = np.repeat(first, np.diff(captions.starts))  # of each caption
    order = np.argsort(owner, kind="stable")
    keep = np.ones(len(order), bool)
    repeated = np.unique(first[np.flatnonzero(first != np.arange(len(first)))])
    for begin, end in zip(*(np.searchsorted(owner[order], repeated, side) for side in ("left", "right")), strict=True):
        seen: set[str] = set()
        for position in range(begin, end):
            text = captions.strings[int(order[position])]
            keep[position] = text not in seen
            seen.add(text)
    order = order[keep]
    counts = np.bincount(owner[order], minlength=len(first))[kept]
    return PackedLists(captions.strings.take(order), np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))


def save_index(index: ShardIndex, folder: str | Path) -> Path:
    """Write the index into its shards' folder, whole or not at all; return its path."""
    path = Path(folder) / INDEX_NAME
    arrays = {
        "version": np.array(VERSION),
        "names": np.array(index.names, dtype=np.str_),
        "sizes": index.sizes,
        "keys": index.keys.blob,
        "key_offsets": index.keys.offsets,
        "captions": index.captions.strings.blob,
        "caption_offsets": index.captions.strings.offsets,
        "caption_starts": index.captions.starts,
        "shard": index.shard,
        "offset": index.offset,
        "length": index.length,
        "broken_reasons": np.array(list(index.broken), dtype=np.str_),
        "broken_counts": np.array(list(index.broken.values()), np.int64),
    }
    if index.sums is not None:
        arrays["sums"] = index.sums
    with written_whole(path) as file:
        np.savez(file, **arrays)
    return path


def load_index(folder: str | Path) -> ShardIndex:
    """Read the index of the shards in a folder; code inside it never runs.

    Raises:
        WlsupError: if it is damaged or of another version.
    """
    path = Path(folder) / INDEX_NAME
    again = "Delete it, and make it again with `wlsup data prepare`."
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if int(arrays["version"]) != VERSION:
                raise WlsupError(f"{path} is of version {int(arrays['version'])}, not {VERSION}. {again}")
            strings = PackedStrings(arrays["captions"], arrays["caption_offsets"])
            index = ShardIndex(
                names=arrays["names"].tolist(),
                sizes=arrays["sizes"],
                keys=PackedStrings(arrays["keys"], arrays["key_offsets"]),
                captions=PackedLists(strings, arrays["caption_starts"]),
                shard=arrays["shard"],
                offset=arrays["offset"],
                length=arrays["length"],
                broken=dict(zip(arrays["broken_reasons"].tolist(), arrays["broken_counts"].tolist(), strict=True)),
                sums=arrays.get("sums"),
            )
    except WlsupError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WlsupError(f"{path} is damaged ({type(error).__name__}: {error}). {again}") from error
    _check_consistent(index, path, again)
    return index


def verify_shards(index: ShardIndex, folder: str | Path, only: str | None = None) -> None:
    """Compare every shard's size with the index, or that of ``only`` one.

    Raises:
        WlsupError: naming the first shard that is missing, cut short or changed, and what it should hold.
    """
    counts = index.counts
    for position, name in enumerate(index.names):
        path = Path(folder) / name
        if only not in (None, name):
            continue
        try:
            size = path.stat().st_size
        except OSError:
            size = None
        expected = int(index.sizes[position])
        if size == expected:
            continue
        state = "is missing" if size is None else f"has {size:,} bytes"
        raise WlsupError(
            f"{path} {state}, and the index expects {expected:,} bytes with {int(counts[position]):,} samples "
            f"({'cut short' if size is not None and size < expected else 'not what was indexed'}). Copy or download "
            f"the shard again; or, if it was changed on purpose, delete {INDEX_NAME} and run `wlsup data prepare`."
        )


def _check_consistent(index: ShardIndex, path: Path, again: str) -> None:
    samples = {len(getattr(index, name.name)) for name in fields(index)[2:7]}
    sound = (
        len(samples) == 1
        and len(index.sizes) == len(index.names)
        and (index.sums is None or len(index.sums) == len(index.names))
        and (not len(index) or (index.shard.min() >= 0 and index.shard.max() < len(index.names)))
        and bool((index.offset >= 0).all() and (index.length >= 0).all())
        and not any("/" in name or "\\" in name or name in ("", ".", "..") for name in index.names)
    )
    if not sound:
        raise WlsupError(f"{path} is damaged: its parts do not fit together. {again}")
