"""Sources of captioned pictures, by name: each gives keys, captions and a way to read the pictures."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from wlsup.data.decoders import JpegPicture, decode, open_picture
from wlsup.data.packed import PackedLists, PackedStrings
from wlsup.data.stores import ImageStore
from wlsup.errors import WlsupError, choose

__all__ = [
    "CaptionSource",
    "MemoryPictures",
    "Pictures",
    "PicturesPart",
    "SourceRequest",
    "StoredPictures",
    "check_source",
    "load_source",
    "open_at",
    "register",
    "source_names",
]


class Pictures(Protocol):
    """Pictures by position; picklable, and safe to read from several workers."""

    def __len__(self) -> int:
        """Return their number."""
        ...

    def read(self, index: int) -> Tensor:
        """Return picture ``index`` as (3, H, W) uint8.

        Raises:
            UnreadableImage: saying why.
        """
        ...


@dataclass
class MemoryPictures:
    """Pictures held in memory.

    Args:
        images: (n, 3, H, W) uint8.
    """

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """Return picture ``index`` as (3, H, W) uint8."""
        return self.images[index]


@dataclass
class StoredPictures:
    """Pictures in a folder or an archive.

    Args:
        store: where they lie.
        names: one a picture, as the store knows them.
    """

    store: ImageStore
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Tensor:
        """Return picture ``index`` as (3, H, W) uint8; Raises `UnreadableImage` saying why not."""
        return decode(self.store.read(self.names[index]))

    def open(self, index: int) -> JpegPicture | Tensor:
        """Return picture ``index``, a JPEG undecoded; Raises `UnreadableImage` saying why not."""
        return open_picture(self.store.read(self.names[index]))


@dataclass
class PicturesPart:
    """Some of a source's pictures.

    Args:
        whole: all of them.
        indices: the positions of these.
    """

    whole: Pictures
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        """Return picture ``index`` of the part as (3, H, W) uint8; Raises `UnreadableImage` saying why not."""
        return self.whole.read(self.indices[index])

    def open(self, index: int) -> JpegPicture | Tensor:
        """Return picture ``index`` of the part, a JPEG undecoded; Raises `UnreadableImage` saying why not."""
        return open_at(self.whole, self.indices[index])

    @property
    def groups(self) -> np.ndarray | None:
        """(n,) the shard each picture lies in, where they lie in shards."""
        groups = getattr(self.whole, "groups", None)
        return None if groups is None else groups[np.asarray(self.indices, dtype=np.int64)]


def open_at(pictures: Pictures, index: int) -> JpegPicture | Tensor:
    """Return picture ``index`` undecoded where ``pictures`` can (they have ``open``), else decoded."""
    opener = getattr(pictures, "open", pictures.read)
    return opener(index)


@dataclass
class CaptionSource:
    """Captioned pictures.

    Args:
        name: of the source.
        keys: n stable, distinct names, the same on every machine.
        captions: n lists of at least one caption each.
        pictures: the n pictures, in the same order.
        dropped: key and reason of pictures listed but left out (file missing, no caption).
        notes: sentences about what was mended or left out in reading, for the log.
        validation: held-out pairs, where the source has its own; otherwise they are split off by hash.
    """

    name: str
    keys: Sequence[str]
    captions: Sequence[Sequence[str]]
    pictures: Pictures
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    validation: CaptionSource | None = None

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.captions) == len(self.pictures):
            raise ValueError(
                f"{self.name}: {len(self.keys)} keys, {len(self.captions)} caption lists, {len(self.pictures)} pictures"
            )

    def select(self, keys: Sequence[str]) -> CaptionSource:
        """Return the records that ``keys`` name, in their order."""
        position = {key: index for index, key in enumerate(self.keys)}
        return self.take([position[key] for key in keys])

    def take(self, indices: Sequence[int]) -> CaptionSource:
        """Return the records at ``indices``, in their order."""
        keys, captions = _taken(self.keys, indices), _taken(self.captions, indices)
        return CaptionSource(self.name, keys, captions, PicturesPart(self.pictures, indices))


def _taken(items: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    if isinstance(items, PackedStrings | PackedLists):
        return items.take(indices)
    return [items[index] for index in indices]


@dataclass(frozen=True)
class SourceRequest:
    """What a data module asks a source for.

    Args:
        captions: path of the captions, if given.
        images: path of the pictures, if given.
        pairs: number of training pairs wanted; None for all there are.
        validation_pairs: number of held-out pairs wanted.
        max_bad_fraction: highest tolerated fraction of bad rows, for errors that only the source can see.
    """

    captions: str | None = None
    images: str | None = None
    pairs: int | None = None
    validation_pairs: int = 0
    max_bad_fraction: float = 0.05


_Builder = Callable[..., CaptionSource]
_BUILDERS: dict[str, _Builder] = {}
_MODULES = tuple(
    f"wlsup.data.{name}"
    for name in ("mini_source", "table", "coco", "conceptual_captions", "imagenet_captions", "shards_source")
)


def register(name: str) -> Callable[[_Builder], _Builder]:
    """Register a source under ``name``.

    The builder is called as ``builder(request, **options)``; its keyword-only parameters are the options the source
    takes through ``source_options``.
    """

    def add(builder: _Builder) -> _Builder:
        _BUILDERS[name] = builder
        return builder

    return add


def source_names() -> list[str]:
    """Return the names of all sources, sorted."""
    for module in _MODULES:
        importlib.import_module(module)
    return sorted(_BUILDERS)


def check_source(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a source that is unknown, or an option that it has not; Raises `WlsupError` with those there are."""
    builder = _BUILDERS[choose("source", name, source_names())]
    allowed = [
        parameter.name
        for parameter in inspect.signature(builder).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in options:
        choose(f"option of source {name!r} in source_options:", option, allowed)


def load_source(name: str, request: SourceRequest, options: Mapping[str, Any] | None = None) -> CaptionSource:
    """Build a source.

    Args:
        name: one of `source_names`.
        request: paths and sizes.
        options: the source's own settings.

    Raises:
        WlsupError: if the name or an option is unknown, or the source finds fault with its files.
    """
    check_source(name, options or {})
    source = _BUILDERS[name](request, **(options or {}))
    if not source.keys:
        causes = dict(sorted({why: key for key, why in sorted(source.dropped.items(), reverse=True)}.items())[:3])
        told = "; ".join(f"{why}, such as {key!r}" for why, key in causes.items())
        raise WlsupError(
            f"Source {name!r} has no usable pair{f' ({told})' if told else ''}. Check the paths of captions and "
            "images, and that names are whole, with their endings."
        )
    return source
