"""Validation pictures: a part of an evaluation set's bank, for whatever is chosen; the test queries never choose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features

__all__ = ["FRACTION", "Split", "picture_keys", "take", "validation_split"]

FRACTION = 0.2
"""Share of each class's bank pictures that validates."""

_SALT = "wlsup validation"


class Split(NamedTuple):
    """Positions of a bank's pictures: (b,) int64 that stay the bank, and (v,) int64 that validate; both ascending."""

    bank: Tensor
    validation: Tensor


def picture_keys(dataset: Dataset) -> list[str]:
    """Return each picture's identity: its name, or its position in a set that is published as an array."""
    names = getattr(dataset, "names", None)
    return [str(position) for position in range(len(dataset))] if names is None else [str(name) for name in names]


def validation_split(labels: Tensor, keys: Sequence[str], fraction: float = FRACTION) -> Split:
    """Set apart a share of each class, those that come first by SHA-256 of their key: the same on every machine.

    A class of n pictures gives ``round(fraction n)``, at least one, and keeps at least one; a class of one picture
    keeps it.

    Args:
        labels: (n,) class ids of the bank.
        keys: n identities, see `picture_keys`; a picture's side does not depend on the order in which they are listed.
        fraction: in (0, 1).

    Returns:
        The positions of both parts.

    Raises:
        WlsupError: labels and keys differ in number, the fraction is out of range, or no class has two pictures.
    """
    if len(labels) != len(keys):
        raise WlsupError(f"A bank of {len(labels)} labels has {len(keys)} keys. Give one key a picture.")
    if not 0 < fraction < 1:
        raise WlsupError(f"The validation fraction must be in (0, 1), not {fraction}.")
    order = sorted(range(len(keys)), key=lambda row: (hashlib.sha256(f"{_SALT}\0{keys[row]}".encode()).digest(), row))
    by_class: dict[int, list[int]] = {}
    for row in order:
        by_class.setdefault(int(labels[row]), []).append(row)
    held = torch.zeros(len(keys), dtype=torch.bool)
    for rows in by_class.values():
        held[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    if not held.any():
        raise WlsupError("No class of the bank has two pictures, so that none can be set apart to validate on.")
    return Split((~held).nonzero().squeeze(1), held.nonzero().squeeze(1))


def take(features: Features, rows: Tensor) -> Features:
    """Return some of the pictures' features, in the order of ``rows``."""
    return Features(features.features[rows], features.labels[rows], features.indices[rows])
