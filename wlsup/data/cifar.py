"""CIFAR-10 and CIFAR-100 in their published form: pickled batches, read without running what a pickle may hold.

Source: Krizhevsky 2009.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = ["CIFAR10", "CIFAR100", "CifarLayout", "read_cifar"]


@dataclass(frozen=True)
class CifarLayout:
    """The files of one of the two.

    Args:
        folder: they lie in.
        train: batches of training pictures.
        test: batch of test pictures.
        meta: file of class names.
        labels: name of the labels in a batch.
        names: name of the class names in ``meta``.
    """

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str

    @property
    def files(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.train, self.test, self.meta)


CIFAR10 = CifarLayout(
    "cifar-10-batches-py",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test_batch",
    "batches.meta",
    "labels",
    "label_names",
)
CIFAR100 = CifarLayout("cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names")

# What numpy arrays, strings and bytes need, under the names that all versions of numpy and Python have given them.
_SAFE = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def read_cifar(folder: Path, layout: CifarLayout) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """Read all batches.

    Args:
        folder: the one that holds ``layout.folder``.
        layout: `CIFAR10` or `CIFAR100`.

    Returns:
        (pictures (n, 3, 32, 32) uint8, labels (n,) int64) of training, of test, and the class names.

    Raises:
        WlsupError: if a file is damaged, holds code, or its pictures and labels do not fit together.
    """
    base = folder / layout.folder
    meta = base / layout.meta
    names = _unpickle(meta).get(layout.names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WlsupError(f"{meta} has no list {layout.names!r} of class names. Fetch the set again.")
    batches = [_batch(base / name, layout, len(names)) for name in layout.train]
    train = torch.cat([pictures for pictures, _ in batches]), torch.cat([labels for _, labels in batches])
    return train, _batch(base / layout.test, layout, len(names)), names


def _batch(path: Path, layout: CifarLayout, classes: int) -> tuple[Tensor, Tensor]:
    record = _unpickle(path)
    pictures, labels = record.get("data"), record.get(layout.labels)
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8 or pictures.ndim != 2:
        raise WlsupError(f"{path} has no array 'data' of uint8 pictures. Fetch the set again.")
    if pictures.shape[1] != 3 * 32 * 32 or not isinstance(labels, list | np.ndarray) or len(labels) != len(pictures):
        count = len(labels) if isinstance(labels, list | np.ndarray) else "no"
        raise WlsupError(
            f"{path} has {len(pictures)} pictures of {pictures.shape[1]} values and {count} labels. There must be 3072 "
            "values (3 x 32 x 32) a picture and one label each; fetch the set again."
        )
    if not all(isinstance(label, int | np.integer) and 0 <= label < classes for label in labels):
        raise WlsupError(f"{path} has labels outside 0 to {classes - 1}, the classes of {layout.meta}.")
    return torch.from_numpy(pictures.reshape(-1, 3, 32, 32).copy()), torch.tensor([int(label) for label in labels])


class _Unpickler(pickle.Unpickler):
    """Builds plain values and numpy arrays; anything else, such as a call to ``os.system``, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            # Written by Python 2, whose strings arrive as latin-1 text.
            record = _Unpickler(file, encoding="latin1").load()
    except OSError as error:
        raise WlsupError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a corrupt pickle may raise anything
        raise WlsupError(
            f"{path} is no batch of CIFAR that can be trusted and read ({error}): it is cut off, damaged, or holds "
            "code. Delete it and fetch the set again."
        ) from error
    if not isinstance(record, dict):
        raise WlsupError(f"{path} holds a {type(record).__name__}, not a batch of CIFAR.")
    return record
