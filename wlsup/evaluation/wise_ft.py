"""WiSE-FT: the straight line in weight space from the pretrained encoder to the fine-tuned one, and a place on it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = ["ALPHAS", "RULE", "check_alphas", "choose_alpha", "interpolate"]

ALPHAS = tuple(round(step / 10, 1) for step in range(11))
"""Wortsman et al.'s grid: 0, 0.1, ..., 1."""

RULE = (
    "the alpha of highest k-NN accuracy on validation pictures of the in-domain sets, which are held out of their "
    "banks (mean over sets); of equal ones the lowest; test queries and out-of-domain sets choose nothing"
)
NO_RULE = (
    "the grid's alpha nearest to 0.5, which Wortsman et al. recommend where there is nothing to choose by: there is no "
    "in-domain set"
)


def check_alphas(alphas: Sequence[float]) -> tuple[float, ...]:
    """Return a grid in ascending order, each value once.

    Raises:
        WlsupError: a value outside [0, 1], or a grid without its ends 0 and 1.
    """
    grid = tuple(sorted({float(alpha) for alpha in alphas}))
    if not grid or not all(0 <= alpha <= 1 for alpha in grid) or grid[0] != 0 or grid[-1] != 1:
        raise WlsupError(
            f"alphas {list(alphas)}: give numbers in [0, 1] with both ends, such as 0,0.25,0.5,0.75,1; 0 is the "
            "pretrained encoder and 1 the fine-tuned one."
        )
    return grid


def interpolate(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float, held: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return ``(1 - alpha) start + alpha end`` of every floating tensor.

    Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), equation 1 (weight-space
    ensembling).

    Args:
        start: theta_0 by name.
        end: theta_1, of the same names and shapes.
        alpha: in [0, 1]; at 0 and at 1 the ends themselves are returned, bit for bit.
        held: globs over names that are not blended but taken from ``end`` at every alpha above 0.

    Returns:
        Tensors in ``end``'s dtypes, blended in fp32 or better; what is no floating number (counters, tables) is
        ``end``'s at every alpha.

    Raises:
        WlsupError: names or shapes differ, or alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise WlsupError(f"alpha {alpha}: give a number in [0, 1]; 0 is the pretrained encoder, 1 the fine-tuned one.")
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (start, end)]
    if differing := sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)):
        first = differing[0]
        raise WlsupError(
            f"The two ends of the curve are not one model: {len(differing)} tensors differ, first {first} "
            f"({shapes[0].get(first)} at alpha 0, {shapes[1].get(first)} at 1). Give two states of one run."
        )
    return {name: _blend(name, start[name], tensor, alpha, held) for name, tensor in end.items()}


def _blend(name: str, start: Tensor, end: Tensor, alpha: float, held: Sequence[str]) -> Tensor:
    if alpha == 1 or not end.is_floating_point():
        return end
    if alpha == 0:
        return start
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in held):
        return end
    precise = torch.promote_types(end.dtype, torch.float32)
    # lerp leaves a tensor that did not move as it is, to the bit.
    return torch.lerp(start.to(precise), end.to(precise), alpha).to(end.dtype)


def choose_alpha(alphas: Sequence[float], accuracies: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Choose a place on the curve.

    Source: Wortsman et al. 2022, section 3 and appendix: the mixing coefficient by held-out data of the fine-tuning
    distribution, or 0.5.

    Args:
        alphas: the grid, ascending.
        accuracies: of each in-domain set, validation accuracy in [0, 1] at each alpha.

    Returns:
        ``{"validation": {"sets": [...], "accuracy": [mean at each alpha]}, "chosen_alpha": float, "rule": str}``; of
        no set the accuracy is empty, and the choice the grid's alpha nearest to 0.5.
    """
    means = [sum(at) / len(at) for at in zip(*accuracies.values(), strict=True)]
    if means:
        chosen = alphas[means.index(max(means))]
    else:
        chosen = min(alphas, key=lambda alpha: (abs(alpha - 0.5), alpha))
    return {
        "validation": {"sets": list(accuracies), "accuracy": means},
        "chosen_alpha": chosen,
        "rule": RULE if means else NO_RULE,
    }
