"""What a frozen classifier's labels mean in the new task: a fixed assignment, or a linear map of its probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wlsup.errors import WlsupError, choose

__all__ = ["FixedLabelMap", "LabelMap", "LabelMapSpec", "LinearLabelMap", "build_label_map"]

_KINDS = ("auto", "fixed", "linear")
_ORDERS = ("ascending", "descending", "index")
_REDUCTIONS = ("max", "mean")


@dataclass(frozen=True)
class LabelMapSpec:
    """How a frozen classifier's labels are read as classes of the new task.

    Args:
        kind: "fixed", "linear", or "auto": fixed where the classifier has enough labels, else linear.
        per_class: labels given to each class by the fixed map; Neekhara et al. give 10 of ImageNet's 1,000.
        order: labels are given out by their logit on the base picture, "ascending" (Neekhara et al.: what the picture
            does not already look like) or "descending", or by "index" (Elsayed et al.).
        reduce: a class's logit is the "max" or "mean" over its labels.

    Raises:
        WlsupError: an unknown choice, a value out of its range, or an option that the kind does not read.
    """

    kind: Literal["auto", "fixed", "linear"] = "auto"
    per_class: int = 1
    order: Literal["ascending", "descending", "index"] = "ascending"
    reduce: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        choose("kind of label map", self.kind, _KINDS)
        choose("order of the label map", self.order, _ORDERS)
        choose("reduction of the label map", self.reduce, _REDUCTIONS)
        if self.per_class < 1:
            raise WlsupError(f"label_map.per_class must be at least 1, not {self.per_class}.")
        for option in ("per_class", "order", "reduce") if self.kind == "linear" else ():
            if getattr(self, option) != getattr(LabelMapSpec, option):
                raise WlsupError(f"label_map.{option} is of kind: fixed; linear does not read it: leave it out.")


class LabelMap(nn.Module):
    """(B, K) logits of the frozen classifier -> (B, classes) of the new task."""

    def assign(self, base_logits: Tensor) -> None:
        """Settle what depends on the (K,) logits of the base picture; called once, before training."""


class FixedLabelMap(LabelMap):
    """Each class is some of the classifier's labels, none shared.

    Source: Elsayed et al. 2019, "Adversarial Reprogramming of Neural Networks", section 3 (h_g); Neekhara et al. 2022,
    "Cross-modal Adversarial Reprogramming" (several labels a class, by ascending logit, max).

    Args:
        classes: of the new task.
        labels: K, of the classifier.
        per_class: m, labels a class.
        order: see `LabelMapSpec`.
        reduce: see `LabelMapSpec`.

    Raises:
        WlsupError: the classifier has fewer than classes * m labels.
    """

    def __init__(
        self, classes: int, labels: int, per_class: int = 1, order: str = "ascending", reduce: str = "max"
    ) -> None:
        super().__init__()
        if classes * per_class > labels:
            raise WlsupError(
                f"A fixed label map of {classes} classes with {per_class} labels each needs {classes * per_class} "
                f"labels, and the frozen classifier has {labels}. Set label_map.kind to linear, or lower "
                "label_map.per_class."
            )
        self.classes, self.per_class, self.order, self.reduce = classes, per_class, order, reduce
        self.register_buffer("assigned", self._dealt(torch.arange(labels)), persistent=False)

    def assign(self, base_logits: Tensor) -> None:
        """Deal the labels out by their logit on the base picture, unless by index."""
        if self.order != "index":
            ranked = base_logits.argsort(descending=self.order == "descending", stable=True)
            self.assigned = self._dealt(ranked).to(self.assigned.device)

    def _dealt(self, ranked: Tensor) -> Tensor:
        """(K,) labels as ranked -> (classes, m): class after class gets its m labels."""
        return ranked[: self.classes * self.per_class].view(self.classes, self.per_class)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, K) -> (B, classes)."""
        own = logits[:, self.assigned]
        return own.amax(-1) if self.reduce == "max" else own.mean(-1)


class LinearLabelMap(LabelMap):
    """A linear map of the classifier's probabilities, which trains with the program.

    Source: Neekhara et al. 2022, for at least as many classes as the classifier has labels.

    Args:
        classes: of the new task.
        labels: K, of the classifier.
    """

    def __init__(self, classes: int, labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(labels, classes)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, K) -> (B, classes)."""
        return self.linear(logits.softmax(-1))


def build_label_map(spec: LabelMapSpec, classes: int, labels: int) -> LabelMap:
    """Build the map of a classifier with K ``labels`` to ``classes`` classes.

    Raises:
        WlsupError: see `FixedLabelMap`.
    """
    if spec.kind == "linear" or (spec.kind == "auto" and classes * spec.per_class > labels):
        return LinearLabelMap(classes, labels)
    return FixedLabelMap(classes, labels, spec.per_class, spec.order, spec.reduce)
