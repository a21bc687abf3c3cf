"""Millions of strings without millions of objects: one block of bytes, and where each string begins.

Such a list costs its text and eight bytes a string, where a list of Python strings costs some sixty more each; and
forked workers share it, since reading it changes no reference count inside it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import overload

import numpy as np

__all__ = ["PackedLists", "PackedStrings", "StringPacker", "first_of_each"]


_BLOCK = 1 << 16


class PackedStrings(Sequence[str]):
    """An immutable sequence of strings.

    Args:
        blob: (bytes,) uint8: the UTF-8 texts, one after another.
        offsets: (n + 1,) int64: where each begins, and the end of the last.
    """

    def __init__(self, blob: np.ndarray, offsets: np.ndarray) -> None:
        self.blob = blob
        self.offsets = offsets

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedStrings:
        """Pack ``strings``."""
        packer = StringPacker()
        for text in strings:
            packer.append(text)
        return packer.packed()

    @classmethod
    def joined(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        """Return the strings of all parts, one after another."""
        blob = np.concatenate([np.zeros(0, np.uint8), *(part.blob for part in parts)])
        return cls(blob, _shifted([part.offsets for part in parts]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        begin, end = self.offsets[index % len(self) :][:2]
        return self.blob[begin:end].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int] | np.ndarray) -> PackedStrings:
        """Return the strings at ``indices``, in their order."""
        indices = np.asarray(indices, dtype=np.int64)
        starts, lengths = self.offsets[indices], np.diff(self.offsets)[indices]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        blob = np.empty(int(offsets[-1]), np.uint8)
        for first in range(0, len(indices), _BLOCK):  # by blocks: positions take eight times the room of the text
            last = min(first + _BLOCK, len(indices))
            begin, end = offsets[first], offsets[last]
            shift = starts[first:last] - (offsets[first:last] - begin)
            blob[begin:end] = self.blob[np.arange(end - begin) + np.repeat(shift, lengths[first:last])]
        return PackedStrings(blob, offsets)


class StringPacker:
    """Builds `PackedStrings` one string at a time."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def append(self, text: str) -> None:
        """Add one string."""
        self._blob += text.encode("utf-8", "surrogatepass")
        self._offsets.append(len(self._blob))

    def packed(self) -> PackedStrings:
        """Return what was added; the packer is not to be used afterwards."""
        return PackedStrings(np.frombuffer(self._blob, np.uint8), np.frombuffer(self._offsets, np.int64))


class PackedLists(Sequence[list[str]]):
    """An immutable sequence of lists of strings: the captions of each picture.

    Args:
        strings: all strings, list after list.
        starts: (n + 1,) int64: where each list begins in ``strings``, and the end of the last.
    """

    def __init__(self, strings: PackedStrings, starts: np.ndarray) -> None:
        self.strings = strings
        self.starts = starts

    @classmethod
    def of(cls, lists: Iterable[Sequence[str]]) -> PackedLists:
        """Pack ``lists``."""
        packer, starts = StringPacker(), array("q", [0])
        for texts in lists:
            for text in texts:
                packer.append(text)
            starts.append(len(packer))
        return cls(packer.packed(), np.frombuffer(starts, np.int64))

    @classmethod
    def joined(cls, parts: Sequence[PackedLists]) -> PackedLists:
        """Return the lists of all parts, one after another."""
        return cls(PackedStrings.joined([part.strings for part in parts]), _shifted([part.starts for part in parts]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> list[str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[str]]: ...
    def __getitem__(self, index: int | slice) -> list[str] | list[list[str]]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        begin, end = self.starts[index % len(self) :][:2]
        return self.strings[int(begin) : int(end)]

    def __iter__(self) -> Iterator[list[str]]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int] | np.ndarray) -> PackedLists:
        """Return the lists at ``indices``, in their order."""
        indices = np.asarray(indices, dtype=np.int64)
        begins, counts = self.starts[indices], np.diff(self.starts)[indices]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return PackedLists(self.strings.take(np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)), starts)


def _shifted(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join arrays that each go from 0 to their end into one that goes on."""
    steps = np.concatenate([np.zeros(1, np.int64), *(np.diff(part) for part in parts)])
    return np.cumsum(steps)


def first_of_each(strings: PackedStrings) -> np.ndarray:
    """Return, for each string, the position of the first that is equal to it, itself if there is none before.

    Equal is what agrees in 128 bits of SHA-256.

    Returns:
        (n,) int64.
    """
    heads, ends = bytearray(), strings.offsets.tolist()
    text = memoryview(np.ascontiguousarray(strings.blob))
    for begin, end in pairwise(ends):
        heads += sha256(text[begin:end]).digest()[:16]
    high, low = np.frombuffer(heads, ">u8").reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: of equal ones the first comes first
    new = np.ones(len(order), bool)
    new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first
