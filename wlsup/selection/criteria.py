"""Scores by which groups are chosen: by place, by chance, by gradients, by spectrum."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wlsup.errors import WlsupError
from wlsup.ranks import processes
from wlsup.selection.alpha import spectral_alpha
from wlsup.selection.groups import Group

__all__ = ["CRITERIA", "GRADIENT_CRITERIA", "alpha_scores", "choose_groups", "gradient_scores", "place_scores"]

CRITERIA = ("last", "first", "random", "rgn", "fisher", "alpha", "explicit")
GRADIENT_CRITERIA = ("rgn", "fisher")

_TINY = 1e-12


def place_scores(groups: Sequence[Group], criterion: str, seed: int = 0) -> dict[str, float]:
    """Score by place, "last" or "first", or by "random" order.

    Args:
        groups: in order.
        criterion: one of the three.
        seed: of the random order.
    """
    order = list(range(len(groups)))
    if criterion == "first":
        order.reverse()
    elif criterion == "random":
        random.Random(seed).shuffle(order)
    return {group.name: float(score) for group, score in zip(groups, order, strict=True)}


def gradient_scores(
    groups: Sequence[Group], parameters: Mapping[str, nn.Parameter], losses: Iterable[Tensor], criterion: str
) -> dict[str, float]:
    """Score by the gradients of a few batches, averaged over them; with several ranks, of the batches they share.

    "rgn", the relative gradient norm ``||g|| / ||theta||`` of a group's parameters taken together (Lee et al. 2023,
    "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", section 4, where it scales learning rates; the
    hard choice of k groups is ours). "fisher", the mean squared gradient per parameter, of each batch's mean loss: the
    diagonal of the empirical Fisher matrix as Sung et al. 2021 ("Training Neural Networks with Fixed Sparse Masks") use
    it, by batches instead of samples.

    Args:
        groups: what is scored.
        parameters: the encoder's, by the names in the groups; all require gradients.
        losses: a scalar with a graph for each batch, made one at a time.
        criterion: "rgn" or "fisher".

    Raises:
        WlsupError: there was no batch, or a gradient is not finite.
    """
    totals = dict.fromkeys((group.name for group in groups), 0.0)
    batches = 0
    for loss in losses:
        batches += 1
        gradients = _over_ranks(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), parameters)
        by_name = dict(zip(parameters, gradients, strict=True))
        for group in groups:
            squares = sum(float(by_name[n].double().square().sum()) for n in group.names if by_name[n] is not None)
            if criterion == "rgn":
                weights = sum(float(parameters[name].detach().double().square().sum()) for name in group.names)
                totals[group.name] += (squares / max(weights, _TINY)) ** 0.5
            else:
                totals[group.name] += squares / sum(parameters[name].numel() for name in group.names)
    if not batches:
        raise WlsupError("There is no batch to score groups by. Use a criterion that needs none, such as 'last'.")
    scores = {name: total / batches for name, total in totals.items()}
    broken = [name for name, score in scores.items() if score != score or score == float("inf")]
    if broken:
        raise WlsupError(f"The gradients of {', '.join(broken[:3])} are not finite: check the pictures and weights.")
    return scores


def _over_ranks(gradients: Sequence[Tensor | None], parameters: Mapping[str, nn.Parameter]) -> list[Tensor | None]:
    """Return the mean over ranks: the gradient of the global batch, of which each rank has a part."""
    world, _ = processes()
    if world == 1:
        return list(gradients)
    there = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters.values(), strict=True)]
    flat = torch.cat([gradient.flatten() for gradient in there])
    dist.all_reduce(flat)
    parts = (flat / world).split([gradient.numel() for gradient in there])
    return [part.view_as(gradient) for part, gradient in zip(parts, there, strict=True)]


def alpha_scores(groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Score by `spectral_alpha`, averaged over a group's matrices: what has learned little comes first.

    A fused ``qkv`` counts as three matrices. A group with no matrix large enough scores 0 and comes last. A spectrum
    that follows no power law is fitted all the same: such are random matrices, whose alpha is large, and learned least.

    Args:
        groups: what is scored.
        parameters: the encoder's, by the names in the groups.
    """
    scores = {}
    for group in groups:
        alphas = []
        for name in group.names:
            weight = parameters[name]
            if weight.ndim < 2 or not name.endswith("weight"):
                continue
            for matrix in weight.chunk(3) if name.endswith("qkv.weight") else (weight,):
                fit = spectral_alpha(matrix)
                alphas += [fit.alpha] if fit else []
        scores[group.name] = sum(alphas) / len(alphas) if alphas else 0.0
    return scores


def choose_groups(groups: Sequence[Group], scores: Mapping[str, float], k: int) -> list[Group]:
    """Return the k groups of the highest scores, in the encoder's order; of equals, the earlier.

    Raises:
        WlsupError: k is not between 0 and the number of groups.
    """
    if not 0 <= k <= len(groups):
        raise WlsupError(f"k must be between 0 (frozen) and {len(groups)} (all groups), not {k}.")
    ranked = sorted(range(len(groups)), key=lambda position: (-scores[groups[position].name], position))
    return [groups[position] for position in sorted(ranked[:k])]
