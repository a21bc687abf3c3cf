"""ImageNet's classes: their folders (wnids) and names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from wlsup.errors import WlsupError

__all__ = ["class_names_of", "imagenet_wnids", "is_wnid"]

_WNID = re.compile(r"n\d{8}")


def is_wnid(name: str) -> bool:
    """Say whether a folder's name is a WordNet id, such as n01440764."""
    return _WNID.fullmatch(name) is not None


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """Return ImageNet's 1,000 wnids, ascending: class 0 is the first, as in ILSVRC 2012 and its successors."""
    from timm.data import ImageNetInfo  # on use: timm takes seconds to import

    return tuple(sorted(ImageNetInfo("imagenet-1k").label_names()))


def class_names_of(wnids: Iterable[str], mapping: Path | None = None) -> dict[str, list[str]]:
    """Return each class's names, the most common first.

    Args:
        wnids: the classes.
        mapping: a file of lines ``<wnid> name, synonym, ...``, such as ILSVRC's LOC_synset_mapping.txt; None for
            WordNet's names as timm ships them, which cover ImageNet's 1,000 classes and its 22,000.

    Raises:
        WlsupError: if the file cannot be read, or a class has no name.
    """
    names = _from_file(mapping) if mapping is not None else _from_timm()
    wnids = list(wnids)
    missing = [wnid for wnid in wnids if not names.get(wnid)]
    if missing:
        where = str(mapping) if mapping is not None else "WordNet's list"
        raise WlsupError(
            f"{len(missing)} of {len(wnids)} classes have no name in {where}, such as {missing[0]!r}. Give captions: a "
            "file with a line `<wnid> name, synonym, ...` for every class."
        )
    return {wnid: names[wnid] for wnid in wnids}


def _from_file(path: Path) -> dict[str, list[str]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise WlsupError(f"captions: {path} cannot be read ({error.strerror}).") from None
    split = (line.strip().partition(" ") for line in lines)
    return {wnid: [name.strip() for name in rest.split(",") if name.strip()] for wnid, _, rest in split}


def _from_timm() -> dict[str, list[str]]:
    from timm.data import ImageNetInfo  # on use: timm takes seconds to import

    names: dict[str, list[str]] = {}
    for subset in ("imagenet-22k", "imagenet-1k"):
        info = ImageNetInfo(subset)
        for position, wnid in enumerate(info.label_names()):
            names[wnid] = [name.strip() for name in info.index_to_description(position).split(",") if name.strip()]
    return names
