"""How sure a number is: over the pictures of a test set, over seeds, over both, over sets, and among many classes.

Shapes: m test pictures, S seeds, R resamples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = [
    "Interval",
    "crossed_interval",
    "exact_sign_test",
    "holm",
    "mean_and_interval",
    "mean_of_intervals",
    "mean_over_pictures",
    "over_seeds",
    "paired_bootstrap",
    "wilson",
]

_DRAWS_AT_ONCE = 2**22


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


def over_seeds(values: Sequence[float], *, confidence: float = 0.95) -> dict[str, Any]:
    """Return `mean_and_interval` as results are kept: without an interval where a single seed tells none.

    Args:
        values: one number a seed.
        confidence: in (0, 1).

    Returns:
        {"mean", "ci95": [low, high] or None, "values"}.
    """
    mean, low, high = mean_and_interval(values, confidence=confidence)
    return {"mean": mean, "ci95": [low, high] if math.isfinite(low) else None, "values": list(values)}


def wilson(right: int, total: int, *, confidence: float = 0.95) -> Interval:
    """Return a share with Wilson's score interval, which holds for shares near 0 and 1 and for few pictures.

    Source: Wilson 1927; recommended by Brown, Cai and DasGupta 2001.

    Args:
        right: how many were right.
        total: of how many, at least 1.
        confidence: in (0, 1).

    Raises:
        WlsupError: if ``right`` is not in 0..total.
    """
    if total < 1 or not 0 <= right <= total:
        raise WlsupError(f"A share needs 0 <= right <= total and a total of at least 1, not {right} of {total}.")
    z = _normal_quantile((1 + confidence) / 2)
    share, scale = right / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def mean_of_intervals(intervals: Sequence[Interval]) -> Interval:
    """Return the mean of independent estimates, such as of several sets, with an interval made of theirs.

    Source: Zou and Donner 2008 (MOVER): the distances of the limits from the estimates add up in squares. It keeps
    intervals that are not symmetric, and needs nothing but the intervals.

    Args:
        intervals: one an estimate, at least one.

    Raises:
        WlsupError: if there is none.
    """
    if not intervals:
        raise WlsupError("A mean of intervals needs at least one of them.")
    count = len(intervals)
    mean = sum(one.estimate for one in intervals) / count
    down = math.sqrt(sum((one.estimate - one.low) ** 2 for one in intervals)) / count
    up = math.sqrt(sum((one.high - one.estimate) ** 2 for one in intervals)) / count
    return Interval(mean, mean - down, mean + up)


def mean_over_pictures(
    values: Tensor | np.ndarray | Sequence[float], *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Return the mean of one number a picture with its percentile bootstrap interval over pictures (or layers).

    Source: Efron and Tibshirani 1993, chapter 13. For the paired change of a score give its change by picture.

    Args:
        values: (m,) finite, one a picture.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
        confidence: in (0, 1).

    Raises:
        WlsupError: if there is no value, or one that is not finite.
    """
    numbers = _numbers(values)
    generator, means = np.random.default_rng(seed), []
    for start in range(0, resamples, step := max(1, _DRAWS_AT_ONCE // len(numbers))):
        drawn = generator.integers(len(numbers), size=(min(step, resamples - start), len(numbers)))
        means.append(numbers[drawn].mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(numbers.mean()), float(low), float(high))


def crossed_interval(changes: Tensor | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Return the mean change of several seeds on the same pictures, for other seeds *and* other pictures.

    A mean over seeds with Student's interval is about these test pictures; a bootstrap over pictures is about these
    seeds. Seeds and pictures are crossed, and the variances of both add up. Draws of few shots take seeds' place.

    Source: Hillis 2007, "A comparison of denominator degrees of freedom methods for multiple observer ROC studies":
    the two-way random-effects analysis, seeds in the readers' place, pictures in the cases', with his degrees of
    freedom. A bootstrap of few seeds is too narrow (with three it draws but ten different mixtures); this is not.

    Args:
        changes: (S, m), of each seed (two or more) what each picture's score changed by, such as -1, 0 or 1.
        confidence: in (0, 1).

    Raises:
        WlsupError: if there are fewer than two seeds or two pictures, or a value is not finite.
    """
    table = np.asarray(changes.cpu() if isinstance(changes, torch.Tensor) else changes, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise WlsupError(f"Needs two or more seeds of two or more pictures, finite numbers, not {table.shape}.")
    seeds, pictures = table.shape
    mean, by_seed, by_picture = table.mean(), table.mean(1), table.mean(0)
    ms_seed = pictures * ((by_seed - mean) ** 2).sum() / (seeds - 1)
    ms_picture = seeds * ((by_picture - mean) ** 2).sum() / (pictures - 1)
    rest = table - by_seed[:, None] - by_picture + mean
    ms_rest = (rest**2).sum() / ((seeds - 1) * (pictures - 1))
    spread = ms_seed + max(ms_picture - ms_rest, 0.0)
    if spread <= 0:
        return Interval(float(mean), float(mean), float(mean))
    freedom = (seeds - 1) * spread**2 / ms_seed**2 if ms_seed > 0 else math.inf
    from scipy.special import stdtrit

    quantile = float(stdtrit(freedom, (1 + confidence) / 2)) if math.isfinite(freedom) else math.nan
    quantile = quantile if math.isfinite(quantile) else _normal_quantile((1 + confidence) / 2)
    half = quantile * math.sqrt(spread / (seeds * pictures))
    return Interval(float(mean), float(mean - half), float(mean + half))


def exact_sign_test(gained: int, lost: int) -> float:
    """Return the two-sided p-value of "as many pictures gained as lost" (McNemar's test, exact).

    Source: McNemar 1947; the exact form is the binomial test of the pictures that changed.

    Args:
        gained: pictures only right after.
        lost: pictures only right before.
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5))) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number: who is below 0.05 keeps the chance of any false find below 0.05.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Args:
        p_values: in [0, 1], in any order.

    Returns:
        Adjusted, in the order given.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = highest
    return adjusted


def _normal_quantile(probability: float) -> float:
    return statistics.NormalDist().inv_cdf(probability)


def _numbers(values: Tensor | np.ndarray) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    numbers = array.astype(np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise WlsupError(f"An interval over pictures needs one finite number a picture, not {numbers.shape}.")
    return numbers


def _booleans(name: str, values: Tensor | np.ndarray) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise WlsupError(f"{name} must be true or false for each test picture, not {array.dtype} with other values.")
    return array.astype(np.bool_)
