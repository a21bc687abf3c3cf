"""How sure a difference is: over the pictures of a test set, and over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = ["Interval", "mean_and_interval", "paired_bootstrap"]


class Interval(NamedTuple):
    """An estimate with its confidence interval, in the unit of what it estimates."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    correct_before: Tensor | np.ndarray,
    correct_after: Tensor | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Return the change in accuracy with its percentile interval by the paired bootstrap over test pictures.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile interval).

    A picture's contribution to the change is +1 (only right after), -1 (only right before) or 0, so that a resample of
    the m pictures, whatever its order, is a draw of how many of each there are: one multinomial draw takes the place
    of m index draws, with the same distribution.

    Args:
        correct_before: (m,) bool, which test pictures the first model got right.
        correct_after: (m,) bool, the same pictures under the second model.
        seed: of the resampling; the same seed gives the same interval.
        resamples: number of bootstrap resamples.
        confidence: in (0, 1).

    Returns:
        ``(delta, low, high)``: accuracy after minus before, in fractions of the test set, and its interval.

    Raises:
        WlsupError: if the two are empty, not vectors of one length, or hold something else than true and false.
    """
    before, after = _booleans("correct_before", correct_before), _booleans("correct_after", correct_after)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise WlsupError(
            f"A paired bootstrap needs the same test pictures before and after, not {before.shape} and {after.shape}."
        )
    if resamples < 1 or not 0 < confidence < 1:
        raise WlsupError(f"resamples must be at least 1 and confidence in (0, 1), not {resamples} and {confidence}.")
    m = before.size
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(m, [gained / m, lost / m, (m - gained - lost) / m], size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / m, [tail, 1 - tail])
    return Interval((gained - lost) / m, float(low), float(high))


def mean_and_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the mean over seeds with Student's t interval.

    Args:
        values: one number a seed; their unit is the result's.
        confidence: in (0, 1).

    Returns:
        ``(mean, low, high)``; of one value, whose spread nobody knows, the interval is (-inf, inf).

    Raises:
        WlsupError: if there is no value, or one that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise WlsupError(f"A mean over seeds needs one or more finite numbers, not {list(values)}.")
    if not 0 < confidence < 1:
        raise WlsupError(f"confidence must be in (0, 1), not {confidence}.")
    mean = float(numbers.mean())
    if numbers.size == 1:
        return Interval(mean, -math.inf, math.inf)
    from scipy.special import stdtrit  # only here, and scikit-learn brings it

    half = float(stdtrit(numbers.size - 1, (1 + confidence) / 2) * numbers.std(ddof=1) / math.sqrt(numbers.size))
    return Interval(mean, mean - half, mean + half)


def _booleans(name: str, values: Tensor | np.ndarray) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise WlsupError(f"{name} must be true or false for each test picture, not {array.dtype} with other values.")
    return array.astype(np.bool_)
