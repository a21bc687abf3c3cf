"""How far fine-tuning moved the features: linear CKA, neighbours kept, cosine to the pretrained feature.

Shapes: n pictures, P and Q the two encoders' widths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.evaluation.neighbors import nearest_neighbors
from wlsup.evaluation.statistics import Interval, mean_over_pictures

__all__ = ["PROTOCOL", "cka_interval", "cosine_to", "linear_cka", "neighbor_overlap"]

PROTOCOL = "drift:v1 debiased linear CKA, overlap of 10 nearest neighbours, cosine; unit features of bank pictures"
"""The id kept beside drift's numbers."""

_GROUPS = 20


def linear_cka(first: Tensor, second: Tensor, *, debiased: bool = True) -> float:
    """Return how alike two representations of the same pictures are, whatever their rotation and scale.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", linear CKA; debiased as
    Nguyen et al. 2021, "Do Wide and Deep Networks Learn the Same Things?", equation 3 (the unbiased HSIC of Song et al.
    2012). The plain estimate is near 1 for any two wide features of few pictures; the debiased one is near 0 for
    unrelated features, and may be a little below. It takes O(n P Q): no (n, n) matrix is made.

    Args:
        first: (n, P), any scale.
        second: (n, Q) of the same pictures, in the same order.
        debiased: the unbiased estimate; False for Kornblith's own.

    Returns:
        1 for the same up to rotation and scale; plain in [0, 1], debiased at most 1. NaN where one is constant.

    Raises:
        WlsupError: if there are fewer than four pictures, or not the same number on both sides.
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second) or len(first) < 4:
        raise WlsupError(
            f"CKA compares two features of the same four or more pictures, not {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    x, y = (part.double() - part.double().mean(0) for part in (first, second))
    hsic = _unbiased_hsic if debiased else _hsic
    own, other = hsic(x, x), hsic(y, y)  # an unbiased estimate of next to nothing may be below 0
    return hsic(x, y) / math.sqrt(own * other) if own > 0 and other > 0 else math.nan


def cka_interval(first: Tensor, second: Tensor, *, confidence: float = 0.95) -> Interval:
    """Return debiased linear CKA with an interval over pictures, by the jackknife over 20 groups of them.

    Source: Shao and Tu 1995, "The Jackknife and Bootstrap", section 2.3. A bootstrap draws pictures twice, and a
    picture is always like itself: it would push CKA towards 1.

    Args:
        first: (n, P), pictures in no particular order.
        second: (n, Q).
        confidence: in (0, 1).

    Returns:
        Estimate and limits, clipped to at most 1.
    """
    estimate, n = linear_cka(first, second), len(first)
    groups = min(_GROUPS, n // 4)
    if groups < 2 or math.isnan(estimate):
        return Interval(estimate, -math.inf, math.inf)
    group = torch.arange(n) % groups
    left_out = [linear_cka(first[group != one], second[group != one]) for one in range(groups)]
    mean = sum(left_out) / groups
    error = math.sqrt((groups - 1) / groups * sum((value - mean) ** 2 for value in left_out))
    from scipy.special import stdtrit

    half = float(stdtrit(groups - 1, (1 + confidence) / 2)) * error
    return Interval(estimate, estimate - half, min(1.0, estimate + half))


def neighbor_overlap(first: Tensor, second: Tensor, *, k: int = 10) -> tuple[Interval, float]:
    """Return the share of each picture's k nearest pictures that stay among its k nearest, and what chance would give.

    Args:
        first: (n, P) unit rows.
        second: (n, Q) unit rows of the same pictures.
        k: in 1..n - 2.

    Returns:
        (mean share in [0, 1] with its bootstrap interval over pictures, k / (n - 1)).

    Raises:
        WlsupError: if k does not fit.
    """
    n = len(first)
    if not 1 <= k <= n - 2 or len(second) != n:
        raise WlsupError(f"Overlap of k nearest needs k in 1..{n - 2} and the same pictures twice, not k={k}.")
    sides = [_neighbors(part, k) for part in (first, second)]
    shared = (sides[0].unsqueeze(2) == sides[1].unsqueeze(1)).any(2).double().mean(1)
    return mean_over_pictures(shared), k / (n - 1)


def cosine_to(first: Tensor, second: Tensor) -> Interval | None:
    """Return the mean cosine of each picture's two features, None where their widths differ.

    Unlike CKA it counts a rotation of the whole space as drift.

    Args:
        first: (n, P).
        second: (n, Q).
    """
    if first.shape[1] != second.shape[1]:
        return None
    return mean_over_pictures(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=1))


def _neighbors(features: Tensor, k: int) -> Tensor:
    """Return (n, k): each row's nearest others."""
    rows = []
    for part, _, indices in nearest_neighbors(features, features, [k + 1]):
        own = indices == torch.arange(part.start, part.stop).unsqueeze(1)
        own[~own.any(1), -1] = True  # among many equals the picture itself may not be: then the last goes
        rows.append(indices[~own].view(len(indices), k))
    return torch.cat(rows)


def _hsic(x: Tensor, y: Tensor) -> float:
    return float((x.T @ y).square().sum())


def _unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, equation 5, with K = X X^T and L = Y Y^T without their diagonals, never made."""
    n = len(x)
    own_x, own_y = x.square().sum(1), y.square().sum(1)
    row_x, row_y = x @ x.sum(0) - own_x, y @ y.sum(0) - own_y
    trace = (x.T @ y).square().sum() - (own_x * own_y).sum()
    rest = row_x.sum() * row_y.sum() / ((n - 1) * (n - 2)) - 2 * (row_x * row_y).sum() / (n - 2)
    return float((trace + rest) / (n * (n - 3)))
