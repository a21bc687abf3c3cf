"""Ways to judge features by a labelled bank, one call alike for all: which queries are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from wlsup.evaluation.features import Features
from wlsup.evaluation.knn import knn_accuracy, protocol_id

__all__ = ["KnnScorer", "ProbeScorer", "Scorer"]


class Scorer(Protocol):
    """A way to judge features."""

    @property
    def protocol(self) -> str:
        """What is computed, and by which version of it."""
        ...

    def __call__(self, bank: Features, queries: Features, num_classes: int) -> Tensor:
        """Return (m,) bool, which of the m queries are right."""
        ...


@dataclass(frozen=True)
class KnnScorer:
    """The weighted k-NN vote, see `knn_accuracy`; of a bank smaller than k all vote.

    Args:
        k: neighbours.
        temperature: of the vote.
    """

    k: int = 20
    temperature: float = 0.07

    @property
    def protocol(self) -> str:
        """The vote's id."""
        return protocol_id(self.k, self.temperature)

    def __call__(self, bank: Features, queries: Features, num_classes: int) -> Tensor:
        """Return (m,) bool."""
        k = min(self.k, len(bank))
        return knn_accuracy(bank, queries, k=k, ks=(), temperature=self.temperature, num_classes=num_classes).correct


@dataclass(frozen=True)
class ProbeScorer:
    """The linear probe, see `wlsup.evaluation.probe`; its strength is chosen on the bank, anew at each call."""

    @property
    def protocol(self) -> str:
        """The probe's id."""
        from wlsup.evaluation.probe import PROTOCOL

        return PROTOCOL

    def __call__(self, bank: Features, queries: Features, num_classes: int) -> Tensor:
        """Return (m,) bool."""
        from wlsup.evaluation.probe import linear_probe

        return linear_probe(bank, queries, num_classes=num_classes).correct
