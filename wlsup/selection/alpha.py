"""The exponent of a weight matrix's spectrum, as WeightWatcher measures it.

A training run chooses layers by it, so it does without the package, which is an extra; a test holds the two to the same
figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["PowerLaw", "fit_power_law", "spectral_alpha"]

SMALLEST = 1e-5
"""Eigenvalues below it are left out."""

FEWEST = 50
"""Eigenvalues that a fit needs: of fewer the exponent says nothing."""


@dataclass(frozen=True)
class PowerLaw:
    """A fitted tail ``p(x) ~ x^-alpha`` for x >= xmin.

    Args:
        alpha: the exponent.
        xmin: where the tail begins.
        distance: Kolmogorov-Smirnov distance between tail and fit; much above 0.1 there is no power law.
        tail: how many values lie in the tail.
    """

    alpha: float
    xmin: float
    distance: float
    tail: int


def fit_power_law(values: np.ndarray) -> PowerLaw | None:
    """Fit the tail of positive values by maximum likelihood, beginning where the fit is best.

    Source: Clauset, Shalizi & Newman 2009, equations 3.1 and 3.9, continuous case; every value is tried as xmin.

    Args:
        values: (n,), in any order.

    Returns:
        The fit, or None where there are fewer than two values.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if len(x) < 2:
        return None
    best = None
    logs = np.log(x)
    for start in range(len(x) - 1):
        count = len(x) - start
        spread = logs[start:].sum() - count * logs[start]
        if spread <= 0:
            continue
        alpha = 1 + count / spread
        fitted = 1 - (x[start:] / x[start]) ** (1 - alpha)
        distance = float(np.abs(fitted - np.arange(count) / count).max())
        if best is None or distance < best.distance:
            best = PowerLaw(float(alpha), float(x[start]), distance, count)
    return best


def spectral_alpha(weight: Tensor, fewest: int = FEWEST) -> PowerLaw | None:
    """Fit the tail of the eigenvalues of ``W^T W``, the squared singular values.

    Source: Martin, Peng & Mahoney 2021, "Predicting trends in the quality of state-of-the-art neural networks without
    access to training or testing data" (WeightWatcher): alpha between 2 and 6 for well-trained layers, above 6 for
    layers that have learned little. It does not change with the matrix's scale.

    Args:
        weight: (rows, columns), or a convolution's kernel, which is flattened to (out, rest).
        fewest: eigenvalues needed.

    Returns:
        The fit; None for a matrix of fewer than ``fewest`` eigenvalues above 1e-5.
    """
    matrix = weight.detach().to("cpu", torch.float64).flatten(1)
    eigenvalues = torch.linalg.svdvals(matrix).square().numpy()
    eigenvalues = eigenvalues[eigenvalues > SMALLEST]
    return None if len(eigenvalues) < fewest else fit_power_law(eigenvalues)
