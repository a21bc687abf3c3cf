"""The door to weightwatcher: one matrix in, its row of figures out, and nothing outside is disturbed.

The package prints, logs to the root logger, silences everybody's warnings when it is imported, draws from numpy's
global generator, writes attributes on the modules it reads, and on a machine with a GPU rounds weights to half
precision. None of that gets through here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wlsup.errors import WlsupError

__all__ = ["watch", "watcher_version"]


def watcher_version() -> str:
    """Return the version of weightwatcher.

    Raises:
        WlsupError: it is not installed.
    """
    return str(_weightwatcher().__version__)


def watch(
    matrix: Tensor, *, shuffle: bool = True, spikes: bool = False, seed: int = 0, name: str = ""
) -> dict[str, Any]:
    """Return what weightwatcher says of one matrix: a row of its ``analyze()``, for a matrix of any size.

    Source: Martin, Peng & Mahoney 2021, "Predicting trends in the quality of state-of-the-art neural networks without
    access to training or testing data", by the authors' own package. Singular values are taken in float64.

    Args:
        matrix: (m, n), neither all zero nor with a value that is not finite; any float type.
        shuffle: also compare with the same entries in random order ("rand_distance").
        spikes: also fit the Marchenko-Pastur law and count what lies outside ("num_spikes"); takes seconds.
        seed: of the order; the same seed and name give the same order.
        name: of the matrix.

    Raises:
        WlsupError: weightwatcher is not installed.
    """
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.detach().to("cpu", torch.float64), requires_grad=False)
    package = _weightwatcher()
    with _undisturbed(zlib.crc32(f"{seed}/{name}".encode())), _in_float64():
        watcher = _without_random_fit(package.WeightWatcher)(model=nn.ModuleDict({"layer": linear}))
        details = watcher.analyze(
            min_evals=1,
            max_evals=0,
            max_N=max(matrix.shape) + 1,  # beyond its own limits a layer would be left out without a word
            randomize=shuffle,
            mp_fit=spikes,
            plot=False,
            svd_method="accurate",  # not in float32 where there is a GPU
        )
    return details.iloc[0].to_dict()


def _without_random_fit(kind: type) -> type:
    """Leave out the Marchenko-Pastur fit of the shuffled entries: nothing here reports it, and it takes longest."""

    class Watcher(kind):  # type: ignore[misc, valid-type]
        def apply_mp_fit(self, ww_layer: Any, random: bool = True, params: Any = None) -> None:
            if not random:
                super().apply_mp_fit(ww_layer, random, params)

    return Watcher


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """Hand weights over as they are: by itself it takes float32, and with a GPU float16."""
    inner = importlib.import_module("weightwatcher.weightwatcher")
    before = inner.torch_T_to_np
    inner.torch_T_to_np = lambda tensor: tensor.detach().to("cpu", torch.float64).numpy()
    try:
        yield
    finally:
        inner.torch_T_to_np = before


@contextlib.contextmanager
def _undisturbed(seed: int | None) -> Iterator[None]:
    """Keep what is printed, logged and warned to itself, and numpy's generator, logging and warnings as they were."""
    root, own = logging.getLogger(), logging.getLogger("weightwatcher")
    handlers, level, disabled = list(root.handlers), root.level, own.disabled
    state = np.random.get_state()
    own.disabled = True
    if seed is not None:
        np.random.seed(seed)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(state)
        root.handlers[:], own.disabled = handlers, disabled
        root.setLevel(level)


def _weightwatcher() -> Any:
    with _undisturbed(None):
        try:
            return importlib.import_module("weightwatcher")
        except ImportError as error:
            raise WlsupError(
                f"Spectra need weightwatcher, which is not installed ({error}): pip install 'wlsup[spectra]'."
            ) from error
