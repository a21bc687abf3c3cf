"""DINO's weighted k-NN classification: how well pictures of a class lie together in an encoder's feature space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features
from wlsup.evaluation.neighbors import SIMILARITY_TOLERANCE, Search, nearest_neighbors

__all__ = ["PROTOCOL", "KNNResult", "knn_accuracy", "knn_predict", "knn_probabilities", "protocol_id", "protocol_of"]

_VOTE_BYTES = 2**22  # of (queries, classes) votes held at once


def protocol_id(k: int = 20, temperature: float = 0.07) -> str:
    """Return the string that results.json keeps beside its numbers: what was computed, and by which version of it."""
    return f"knn-dino:v1 cosine T={temperature:g} k={k} weighted"


PROTOCOL = protocol_id()


def protocol_of(entries: Iterable[Mapping[str, Any]]) -> str:
    """Return the ids of what was computed: of the k and temperature of each set's entry, one id where all agree."""
    return "; ".join(sorted({protocol_id(entry["k"], entry["temperature"]) for entry in entries})) or PROTOCOL


@dataclass
class KNNResult:
    """What k-NN says about an encoder on one set.

    Args:
        k: the headline k.
        temperature: of the vote.
        accuracy: top-1 accuracy in [0, 1] at each k that was asked for and fits the bank, k among them.
        correct: (m,) bool, which queries were right at the headline k: what `paired_bootstrap` compares.
        predictions: (m,) int64 class ids at the headline k.
        train: n, size of the bank.
        test: m, number of queries.
    """

    k: int
    temperature: float
    accuracy: dict[int, float]
    correct: Tensor = field(repr=False)
    predictions: Tensor = field(repr=False)
    train: int
    test: int

    @property
    def top1(self) -> float:
        """Accuracy in [0, 1] at the headline k."""
        return self.accuracy[self.k]

    @property
    def protocol(self) -> str:
        """The protocol's id with this result's k and temperature."""
        return protocol_id(self.k, self.temperature)


@overload
def knn_predict(bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, **options: object) -> Tensor: ...


@overload
def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: Sequence[int], **options: object
) -> dict[int, Tensor]: ...


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    k: int | Sequence[int],
    temperature: float = 0.07,
    num_classes: int | None = None,
    search: Search = "auto",
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor | dict[int, Tensor]:
    """Classify each query by its k nearest bank pictures, each voting for its class with exp(similarity / temperature).

    Source: Wu et al. 2018 (instance discrimination), section 3.4; Caron et al. 2021 (DINO), ``eval_knn.py``.

    Ties are settled the same way everywhere: equal similarities at the k-th place go to the lower bank index (see
    `nearest_neighbors`), and of classes whose votes are equal but for rounding the lowest class id wins.

    Args:
        bank: (n, D) unit rows, as `extract_features` gives them; neither copied nor changed.
        bank_labels: (n,) integer class ids in 0..num_classes - 1.
        queries: (m, D) unit rows; any m >= 1.
        k: neighbours that vote, in 1..n; or several such numbers, answered from one search.
        temperature: above 0; infinity gives each neighbour the same vote.
        num_classes: None for one more than the largest label.
        search: which search; see `nearest_neighbors`.
        device: where to search; None for where ``bank`` lies.
        progress: called with (queries done, m).

    Returns:
        (m,) int64 predicted class ids on the CPU; for several k, those by k.

    Raises:
        WlsupError: if k, temperature, labels or features are not as above.
    """
    ks = sorted(set(k)) if isinstance(k, Sequence) else [k]
    if not temperature > 0:
        raise WlsupError(f"The k-NN temperature must be above 0, not {temperature}. DINO's is 0.07.")
    found = nearest_neighbors(bank, queries, ks, search=search, device=device)
    bank_labels = _labels("bank", bank_labels, len(bank), num_classes)
    classes = num_classes if num_classes is not None else int(bank_labels.max()) + 1
    predictions = {size: torch.empty(len(queries), dtype=torch.int64) for size in ks}
    for rows, similarities, indices in found:
        for size, classified in _vote(similarities, bank_labels, indices, ks, temperature, classes).items():
            predictions[size][rows] = classified
        if progress is not None:
            progress(rows.stop, len(queries))
    return predictions if isinstance(k, Sequence) else predictions[k]


def knn_probabilities(
    bank: Features, queries: Features, *, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Return each class's share of the k nearest neighbours' votes, the probabilities that `knn_predict` decides by.

    Args:
        bank: training pictures' features, of unit length, and labels.
        queries: the test pictures'.
        num_classes: C.
        k: neighbours that vote, in 1..n.
        temperature: of the vote, above 0.

    Returns:
        (m, C), rows sum to 1, fp32. Classes without a neighbour have 0.
    """
    shares = torch.zeros(len(queries), num_classes)
    for rows, similarities, indices in nearest_neighbors(bank.features, queries.features, [k]):
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        shares[rows].scatter_add_(1, bank.labels[indices], weights / weights.sum(1, keepdim=True))
    return shares


def knn_accuracy(
    bank: Features,
    queries: Features,
    *,
    k: int = 20,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    search: Search = "auto",
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> KNNResult:
    """Score an encoder by `knn_predict` on its features of a labelled set.

    Source: Caron et al. 2021 (DINO): k in {10, 20, 100, 200}, temperature 0.07, k = 20 the headline.

    Args:
        bank: the training pictures' features, normalised, and labels.
        queries: the test pictures', likewise; classes may be missing from them.
        k: the headline k, in 1..n.
        ks: further k to report; those above n are left out.
        temperature: of the vote.
        num_classes: labels must be in 0..num_classes - 1; None takes the largest label's word.
        search: which search; see `nearest_neighbors`.
        device: where to search; None for where the bank lies.
        progress: called with (queries done, m).

    Raises:
        WlsupError: if k is more than the bank holds, a set is empty, or features or labels are not valid.
    """
    truth = _labels("queries", queries.labels, len(queries.features), num_classes)
    kept = sorted({k, *(size for size in ks if size <= len(bank.features))})
    predictions = knn_predict(
        bank.features,
        bank.labels,
        queries.features,
        k=kept,
        temperature=temperature,
        num_classes=num_classes,
        search=search,
        device=device,
        progress=progress,
    )
    correct = {size: predicted == truth for size, predicted in predictions.items()}
    return KNNResult(
        k=k,
        temperature=temperature,
        accuracy={size: int(right.sum()) / len(right) for size, right in correct.items()},
        correct=correct[k],
        predictions=predictions[k],
        train=len(bank.features),
        test=len(truth),
    )


def _labels(name: str, labels: Tensor, expected: int, num_classes: int | None) -> Tensor:
    labels = torch.as_tensor(labels).detach().cpu()
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise WlsupError(
            f"Labels of the k-NN {name} must be a vector of integers, not {labels.dtype} {tuple(labels.shape)}."
        )
    if len(labels) != expected:
        raise WlsupError(f"The k-NN {name} has {expected} features and {len(labels)} labels. Give one label a feature.")
    top = num_classes - 1 if num_classes is not None else None
    outside = labels < 0 if top is None else (labels < 0) | (labels > top)
    if outside.any():
        row = int(outside.nonzero()[0])
        allowed = "0 or more" if top is None else f"in 0..{top}"
        raise WlsupError(
            f"Label {int(labels[row])} of picture {row} of the k-NN {name} is out of range; labels must be {allowed}. "
            "Check the eval set's labels, or set num_classes."
        )
    return labels.to(torch.int64)


def _vote(
    similarities: Tensor, bank_labels: Tensor, indices: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Return the winning class of each row at each of ``ks`` (ascending), from one pass over the neighbours."""
    # A vote is known as well as its similarity: to this relative precision.
    tolerance = min(0.1, SIMILARITY_TOLERANCE / temperature + 1e-6)
    winners: dict[int, list[Tensor]] = {k: [] for k in ks}
    block = max(1, _VOTE_BYTES // (4 * num_classes))
    for nearest, where in zip(similarities.split(block), indices.split(block), strict=True):
        # Relative to the nearest neighbour: the largest vote is 1, and exp cannot overflow at any temperature.
        weights = ((nearest - nearest[:, :1]) / temperature).exp_()
        labels = bank_labels[where]
        votes = torch.zeros(len(nearest), num_classes)
        counted = 0
        for k in ks:
            votes.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
            counted = k
            tied = votes >= votes.amax(1, keepdim=True) * (1 - tolerance)
            winners[k].append(tied.to(torch.uint8).argmax(1))  # the first of equals: the lowest class id
    return {k: torch.cat(parts) for k, parts in winners.items()}
