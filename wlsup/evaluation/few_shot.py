"""Few-shot accuracy: a few bank pictures a class, drawn again and again, and all queries classified by them.

Shapes: C classes, k shots, R draws, m queries, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features
from wlsup.evaluation.probe import fit_logistic

__all__ = ["CLASSIFIERS", "PROTOCOL", "FewShotResult", "few_shot"]

PROTOCOL = "few-shot:v1 all classes, k shots a class of the bank, unit features, C = 1 for logistic, same draws for all"
"""The id kept beside few-shot numbers."""

CLASSIFIERS = ("centroid", "logistic")


@dataclass
class FewShotResult:
    """Who was right, by classifier and shots, draw by draw.

    Args:
        correct: {classifier: {k: (R, m) bool}}; draw r used the same bank pictures for every encoder.
    """

    correct: dict[str, dict[int, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def accuracies(self) -> dict[str, dict[int, list[float]]]:
        """{classifier: {k: R accuracies in [0, 1]}}."""
        return {
            name: {k: right.double().mean(1).tolist() for k, right in by_shots.items()}
            for name, by_shots in self.correct.items()
        }


def few_shot(
    bank: Features,
    queries: Features,
    *,
    num_classes: int,
    shots: Sequence[int] = (1, 5),
    draws: int = 20,
    classifiers: Sequence[str] = CLASSIFIERS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FewShotResult:
    """Classify all queries by k labelled pictures of each class, drawn from the bank ``draws`` times.

    Source: Snell et al. 2017 (prototypical networks) for "centroid": the class whose mean is nearest, by cosine; Tian
    et al. 2020, "Rethinking few-shot image classification", for "logistic": logistic regression (C = 1, fixed, since
    nothing can be held out of so few) on features of unit length. All C classes take part at once (C-way), as a user
    with a small labelled set has them. Two encoders see the same draws, so that their difference is paired.

    Args:
        bank: pictures to draw from, features of unit length, labels.
        queries: pictures to classify, likewise.
        num_classes: C.
        shots: k, each at most what the smallest class of the bank has; larger ones are left out.
        draws: R, at least 2.
        classifiers: of "centroid" and "logistic".
        seed: of the draws.
        progress: called with (draws done, draws to do).

    Returns:
        See `FewShotResult`.

    Raises:
        WlsupError: if an option is out of range, or no k fits the bank.
    """
    if draws < 2 or min(shots, default=0) < 1 or not set(classifiers) <= set(CLASSIFIERS) or not classifiers:
        raise WlsupError(
            f"Few-shot needs two or more draws, shots of at least 1 and classifiers of {', '.join(CLASSIFIERS)}, not "
            f"draws={draws}, shots={list(shots)}, classifiers={list(classifiers)}."
        )
    members = [(bank.labels == label).nonzero().squeeze(1) for label in range(num_classes)]
    present = [label for label, rows in enumerate(members) if len(rows)]
    least = min(len(members[label]) for label in present)
    fitting = [k for k in shots if k <= least]
    if not fitting:
        raise WlsupError(f"No class may have fewer bank pictures than shots: {list(shots)}, and one has {least}.")
    found: dict[str, dict[int, list[Tensor]]] = {name: {k: [] for k in fitting} for name in classifiers}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
        orders = [members[label][torch.randperm(len(members[label]), generator=generator)] for label in present]
        for k in fitting:  # fewer shots are some of more
            rows = torch.cat([order[:k] for order in orders])
            for name in classifiers:
                predicted = _CLASSIFY[name](bank.features[rows], bank.labels[rows], queries.features, num_classes)
                found[name][k].append(predicted == queries.labels)
        if progress is not None:
            progress(draw + 1, draws)
    return FewShotResult(
        {name: {k: torch.stack(right) for k, right in by_shots.items()} for name, by_shots in found.items()}
    )


def _centroid(shots: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    sums = torch.zeros(num_classes, shots.shape[1]).index_add_(0, labels, shots)
    similarities = queries @ torch.nn.functional.normalize(sums, dim=1).T
    similarities[:, torch.bincount(labels, minlength=num_classes) == 0] = -2.0  # no picture, no centre
    return similarities.argmax(1)


def _logistic(shots: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    weights = fit_logistic(shots, labels, num_classes, 1.0, steps=200)
    return (queries.to(weights.dtype) @ weights[:-1] + weights[-1]).argmax(1)


_CLASSIFY: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {"centroid": _centroid, "logistic": _logistic}
