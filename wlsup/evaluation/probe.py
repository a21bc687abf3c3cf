"""A linear probe: logistic regression on frozen features, its strength of regularisation chosen on bank pictures alone.

Shapes: n bank pictures, m queries, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features
from wlsup.evaluation.validation import validation_split

__all__ = ["PROTOCOL", "STRENGTHS", "ProbeResult", "fit_logistic", "linear_probe"]

PROTOCOL = "probe:v1 logistic L-BFGS, unit features standardised on the bank, C from 1e-3..1e3 on a fifth of the bank"
"""The id kept beside a probe's numbers: scores under another id are not comparable."""

STRENGTHS: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""The C that are tried, in scikit-learn's sense: the loss is C times the summed cross-entropy plus half of |W|^2."""

_STEPS = 500


@dataclass
class ProbeResult:
    """What a linear probe says of an encoder on one set.

    Args:
        strength: the C that was chosen.
        validation: accuracy in [0, 1] on the held-out fifth of the bank, by C.
        probabilities: (m, C) of the queries, fp32.
        correct: (m,) bool.
    """

    strength: float
    validation: dict[float, float]
    probabilities: Tensor = field(repr=False)
    correct: Tensor = field(repr=False)

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy of the queries, in [0, 1]."""
        return float(self.correct.double().mean())


def linear_probe(
    bank: Features,
    queries: Features,
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> ProbeResult:
    """Fit a linear classifier on the bank and apply it to the queries.

    Source: Radford et al. 2021 (CLIP), appendix A.3: logistic regression by L-BFGS on frozen features, its L2 strength
    chosen on a validation split, then fitted again on all of the training pictures. Ours: each feature is brought to
    mean 0 and deviation 1 by the statistics of the pictures that are fitted, so that one range of C fits every encoder.

    The validation split is a stratified fifth of the *bank*, by a hash of each picture's position: the queries are seen
    once, at the end.

    Args:
        bank: training pictures' features, of unit length as `extract_features` gives them, and labels.
        queries: test pictures', likewise.
        num_classes: labels are in 0..C - 1.
        strengths: C to try, ascending; of equals the smallest, which is the most regularised, wins.
        device: where to fit; fp64 on the CPU, fp32 elsewhere.
        progress: called with (fits done, fits to do).

    Returns:
        See `ProbeResult`.

    Raises:
        WlsupError: if the bank holds fewer than two classes, or labels are out of range.
    """
    _check(bank, queries, num_classes)
    held_out = _held_out(bank)
    fitted = torch.ones(len(bank), dtype=torch.bool)
    fitted[held_out] = False
    validation: dict[float, float] = {}
    if len(held_out) and len(strengths) > 1:
        x, x_held = standardise(bank.features[fitted], bank.features[held_out])
        weights = None
        for done, strength in enumerate(strengths, start=1):
            # Each begins where the weaker one before it ended: the optimum moves little.
            weights = fit_logistic(x, bank.labels[fitted], num_classes, strength, device=device, start=weights)
            right = _scores(x_held, weights).argmax(1) == bank.labels[held_out]
            validation[strength] = float(right.double().mean())
            if progress is not None:
                progress(done, len(strengths) + 1)
        strength = max(validation, key=lambda one: (validation[one], -one))
    else:
        strength = strengths[len(strengths) // 2]  # a picture a class: nothing can be held out
    x, x_queries = standardise(bank.features, queries.features)
    scores = _scores(x_queries, fit_logistic(x, bank.labels, num_classes, strength, device=device))
    if progress is not None:
        progress(len(strengths) + 1, len(strengths) + 1)
    return ProbeResult(strength, validation, scores.softmax(1).float(), scores.argmax(1) == queries.labels)


def standardise(fitted: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Bring features to mean 0 and deviation 1 by the first set's statistics; a constant feature becomes 0.

    Args:
        fitted: (n, D).
        others: (m, D) each.

    Returns:
        All of them, in fp32.
    """
    mean, deviation = fitted.double().mean(0), fitted.double().std(0, correction=0)
    scale = torch.where(deviation > 1e-8, 1 / deviation.clamp(min=1e-8), 0.0)
    return tuple(((part.double() - mean) * scale).float() for part in (fitted, *others))


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    strength: float,
    *,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    steps: int = _STEPS,
) -> Tensor:
    """Minimise ``C sum_i cross_entropy(W x_i + b, y_i) + |W|^2 / 2`` by L-BFGS.

    The objective is that of scikit-learn's LogisticRegression; torch's L-BFGS runs on a GPU, too.

    Args:
        features: (n, D).
        labels: (n,) int64 in 0..C - 1; classes may be missing.
        num_classes: C.
        strength: above 0, the C of the objective.
        device: where to fit.
        start: (D + 1, C) weights to begin at; None for zeros.
        steps: at most, of L-BFGS.

    Returns:
        (D + 1, C) weights on the CPU, the bias last.
    """
    device = torch.device(device)
    kind = torch.float64 if device.type == "cpu" else torch.float32
    x, y = features.to(device, kind), labels.to(device)
    weights = torch.zeros(x.shape[1] + 1, num_classes, device=device, dtype=kind)
    if start is not None:
        weights.copy_(start)
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )
    decay = 1 / (2 * strength * len(x))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weights[:-1] + weights[-1], y)
        loss = loss + decay * weights[:-1].square().sum()
        loss.backward()
        return loss

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        optimizer.step(closure)
    return weights.detach().cpu()


def _scores(features: Tensor, weights: Tensor) -> Tensor:
    return features.to(weights.dtype) @ weights[:-1] + weights[-1]


def _held_out(bank: Features) -> Tensor:
    """Return which bank pictures validate, none where every class has a single one."""
    if bank.labels.bincount().max() < 2:
        return torch.empty(0, dtype=torch.int64)
    return validation_split(bank.labels, [str(position) for position in bank.indices.tolist()]).validation


def _check(bank: Features, queries: Features, num_classes: int) -> None:
    for name, part in (("bank", bank), ("queries", queries)):
        if not len(part) or int(part.labels.min()) < 0 or int(part.labels.max()) >= num_classes:
            raise WlsupError(f"The probe's {name} needs pictures, with labels in 0..{num_classes - 1}.")
        if not part.features.isfinite().all():
            raise WlsupError(f"A feature of the probe's {name} is NaN or infinite: the encoder has diverged.")
    if len(bank.labels.unique()) < 2:
        raise WlsupError("A linear probe needs a bank of at least two classes.")
