"""What a run's file holds already: a look at a part of it does not take its place."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

__all__ = ["left_as_it_is"]

_WORDS = {"protocol": "metrics"}  # it is kept by metric


def left_as_it_is(file: Path, found: Mapping[str, Collection[Any]]) -> str:
    """Say in one sentence why a run's file must stay; nothing where all that it has is found anew.

    Args:
        file: of the run; one that is not there, or cannot be read, has nothing to lose.
        found: what there will be now, by the key below which the file lists or names the same.
    """
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(earlier, dict):
        return ""
    had = {key: _listed(earlier.get(key)) for key in found}
    lost = {key: [str(one) for one in had[key] if one not in now] for key, now in found.items()}
    told = " and ".join(f"{_WORDS.get(key, key)} {', '.join(ones)}" for key, ones in lost.items() if ones)
    return told and f"{file} was left as it is, since it also has the {told}: --out DIR writes this look elsewhere."


def _listed(value: Any) -> Collection[Any]:
    """Names of what is listed, named, or told as "one; other"."""
    if isinstance(value, str):
        return value.split("; ")
    if isinstance(value, list):
        return [one["name"] if isinstance(one, dict) and "name" in one else one for one in value]
    return value or ()
