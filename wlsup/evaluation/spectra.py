"""The spectra of a model's weights by WeightWatcher: a power law's exponent where there is one, layer by layer.

Source: Martin & Mahoney 2021, "Implicit Self-Regularization in Deep Neural Networks"; Martin, Peng & Mahoney 2021,
"Predicting trends in the quality of state-of-the-art neural networks without access to training or testing data".
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.evaluation.statistics import mean_over_pictures
from wlsup.evaluation.watcher import watch, watcher_version
from wlsup.evaluation.weight_views import LeftOut, WeightView

__all__ = ["LayerSpectrum", "SpectraSpec", "layer_spectrum", "protocol", "random_like", "spectra", "spectra_report"]

SMALLEST = 1e-5
"""weightwatcher leaves eigenvalues below it out of the fit."""

_FEWEST = 20
"""Of fewer eigenvalues weightwatcher makes another kind of fit."""

_OVER, _UNDER = 2.0, 6.0
"""weightwatcher's own limits: below the first a layer is over-trained, above the second under-trained."""


@dataclass(frozen=True)
class SpectraSpec:
    """What counts as a power law, and what is compared.

    Args:
        min_evals: eigenvalues above 1e-5 that a fit needs; of fewer the exponent says nothing.
        max_distance: largest Kolmogorov-Smirnov distance D between tail and fit.
        randomize: compare each matrix with its own entries in random order.
        spikes: fit the Marchenko-Pastur law and count the eigenvalues above it; seconds a matrix.
        seed: of every random order and random matrix.

    Raises:
        WlsupError: a value out of its range.
    """

    min_evals: int = 50
    max_distance: float = 0.1
    randomize: bool = True
    spikes: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_evals < _FEWEST:
            raise WlsupError(
                f"min_evals must be at least {_FEWEST}, not {self.min_evals}: of fewer eigenvalues weightwatcher makes "
                "another kind of fit, and the exponents could not be compared."
            )
        if not 0 < self.max_distance < 1:
            raise WlsupError(f"max_distance must be in (0, 1), not {self.max_distance:g}.")


@dataclass(frozen=True)
class LayerSpectrum:
    """A matrix's eigenvalues, and what is said of them.

    Args:
        eigenvalues: (min(m, n),) of ``W^T W``, the squared singular values, ascending.
        metrics: see `layer_spectrum`.
    """

    eigenvalues: np.ndarray
    metrics: dict[str, Any]


def layer_spectrum(
    matrix: Tensor, spec: SpectraSpec = SpectraSpec(), rank: int | None = None, name: str = ""
) -> LayerSpectrum:
    """Return the spectrum of one matrix.

    Args:
        matrix: (m, n), of any float type.
        spec: what counts as a power law.
        rank: the most it can have, where that is less than min(m, n): then the shuffled matrix, of full rank, is no
            comparison, and "rand_distance" and "num_spikes" are None.
        name: of the layer, for the random order.

    Returns:
        Eigenvalues and metrics. "alpha" and "alpha_weighted" (alpha log10 of the largest eigenvalue) are None where
        there is no power law, and "why" then says why; "fitted_alpha", with its standard error "sigma", is
        weightwatcher's number whether or not there is one. "D" is the fit's distance, "tail" the eigenvalues in it,
        "xmin" the smallest of them, "eigenvalues" how many are above 1e-5. "log_norm" is log10 of the squared Frobenius
        norm. "rand_distance" is the Jensen-Shannon distance to the shuffled matrix's eigenvalues, "num_spikes" those
        beyond the Marchenko-Pastur bulk.
    """
    matrix = matrix.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        return LayerSpectrum(np.zeros(0), _metrics("the weights are not finite"))
    eigenvalues = torch.linalg.svdvals(matrix).square().flip(0).numpy()
    above = int((eigenvalues > SMALLEST).sum())
    if not eigenvalues[-1] > 0:
        return LayerSpectrum(eigenvalues, _metrics("the matrix is zero"))
    full = rank is None or rank >= min(matrix.shape)
    if above < 2:  # weightwatcher fits nothing to one eigenvalue
        log_norm = math.log10(eigenvalues.sum())
        return LayerSpectrum(eigenvalues, _metrics(_too_few(above, len(eigenvalues), spec), above, log_norm=log_norm))
    row = watch(matrix, shuffle=spec.randomize and full, spikes=spec.spikes and full, seed=spec.seed, name=name)
    return LayerSpectrum(eigenvalues, _judge(row, above, len(eigenvalues), spec))


def spectra(
    views: Sequence[WeightView], spec: SpectraSpec = SpectraSpec(), progress: Callable[[int, int], None] | None = None
) -> dict[str, LayerSpectrum]:
    """Return each view's `layer_spectrum` by name.

    Args:
        views: of `weight_views`.
        spec: what counts as a power law.
        progress: called with (done, all).
    """
    found = {}
    for done, view in enumerate(views, start=1):
        found[view.name] = layer_spectrum(view.matrix(), spec, view.rank, view.name)
        if progress:
            progress(done, len(views))
    return found


def random_like(view: WeightView, seed: int = 0) -> WeightView:
    """Return a view of a random matrix: shape, and mean square of the entries, as the view's, normal and independent.

    Of a product through a bottleneck a product of two random factors. It shows what no learning at all looks like.
    """

    def draw() -> Tensor:
        scale = float(view.matrix().double().square().mean().sqrt())
        # a name's own numbers, so that a layer's do not depend on which others are looked at
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{view.name}".encode()))
        m, n = view.shape
        normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
        if view.rank >= min(m, n):
            return scale * normal(m, n)
        return scale * normal(m, view.rank) @ normal(view.rank, n) / view.rank**0.5

    return WeightView(view.name, view.shape, view.rank, view.sources, view.update, draw)


def protocol(spec: SpectraSpec, fused: bool = False) -> str:
    """Say in one line how the figures came about, for whoever compares them."""
    parts = [
        f"weightwatcher {watcher_version()}, float64",
        "eigenvalues of W^T W",
        "fused q, k, v as one matrix" if fused else "fused q, k, v and stacked experts apart",
        "tail by maximum likelihood from the xmin of least D, eigenvalues above 1e-5",
        f"a power law if D <= {spec.max_distance:g} over at least {spec.min_evals} eigenvalues",
    ]
    if spec.randomize:
        parts.append(f"random: own entries shuffled, seed {spec.seed}")
    return "; ".join(parts)


def spectra_report(
    views: Sequence[WeightView],
    columns: Mapping[str, Mapping[str, LayerSpectrum]],
    skipped: Sequence[LeftOut],
    spec: SpectraSpec,
    fused: bool = False,
) -> dict[str, Any]:
    """Return what spectra.json holds.

    Args:
        views: in order; their names are the layers'.
        columns: by "before", "after" and, where asked for, "random": spectra by name. A layer that a column has not is
            None there (an adapter has no before).
        skipped: what was not looked at.
        spec: of the analysis.
        fused: of the views.
    """
    names = ["before", "after", *(["random"] if "random" in columns else [])]
    layers = []
    for view in views:
        entry: dict[str, Any] = {"name": view.name, "shape": list(view.shape), "rank": view.rank, "update": view.update}
        for column in names:
            spectrum = columns.get(column, {}).get(view.name)
            entry[column] = None if spectrum is None else spectrum.metrics
        layers.append(entry)
    return {
        "protocol": protocol(spec, fused),
        "layers": layers,
        "summary": summarize(layers, names),
        "skipped": [left._asdict() for left in skipped],
    }


def summarize(layers: Sequence[Mapping[str, Any]], columns: Sequence[str] = ("before", "after")) -> dict[str, Any]:
    """Return means over the layers that have a power law, each with its interval, and how many have none.

    Returns:
        By column {"layers", "power_law", "alpha": {"mean", "ci95"} or None, "alpha_median", "over_trained" (alpha < 2),
        "under_trained" (alpha > 6), "log_norm"}; and "change": of the layers with a power law before and after, the
        mean change of alpha. Intervals are percentile bootstraps over layers: how much the mean hangs on which layers
        there are, not on the seed. None where no layer has a value; a change needs two layers.
    """
    found: dict[str, Any] = {}
    for column in columns:
        metrics = [layer[column] for layer in layers if layer[column] is not None]
        alphas = [m["alpha"] for m in metrics if m["power_law"]]
        found[column] = None
        if metrics:
            found[column] = {
                "layers": len(metrics),
                "power_law": len(alphas),
                "alpha": _mean(alphas),
                "alpha_median": float(np.median(alphas)) if alphas else None,
                "alpha_weighted": _mean([m["alpha_weighted"] for m in metrics if m["power_law"]]),
                "over_trained": sum(alpha < _OVER for alpha in alphas),
                "under_trained": sum(alpha > _UNDER for alpha in alphas),
                "log_norm": _mean([m["log_norm"] for m in metrics if m["log_norm"] is not None]),
                "rand_distance": _mean([m["rand_distance"] for m in metrics if m["rand_distance"] is not None]),
            }
    both = [
        layer["after"]["alpha"] - layer["before"]["alpha"]
        for layer in layers
        if layer["before"] and layer["after"] and layer["before"]["power_law"] and layer["after"]["power_law"]
    ]
    return found | {"change": {"layers": len(both), "alpha": _mean(both)}}


def _mean(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    mean, low, high = mean_over_pictures(values)
    return {"mean": mean, "ci95": [low, high] if len(values) > 1 else None}


def _judge(row: Mapping[str, Any], above: int, count: int, spec: SpectraSpec) -> dict[str, Any]:
    """Turn a row of weightwatcher's into metrics."""
    fitted, distance = _number(row, "alpha", least=1.0), _number(row, "D", least=0.0)
    why = None
    if above < spec.min_evals:
        why = _too_few(above, count, spec)
    elif row.get("status") != "success" or fitted is None or distance is None:
        why = "weightwatcher found no fit"
    elif distance > spec.max_distance:
        why = f"the tail fits badly: D = {distance:.3f}, above {spec.max_distance:g}"
    return _metrics(
        why,
        above,
        fitted_alpha=fitted,
        sigma=_number(row, "sigma", least=0.0) if fitted is not None else None,
        D=distance,
        tail=None if fitted is None else int(row["num_pl_spikes"]),
        xmin=None if fitted is None else _number(row, "xmin", least=0.0),
        alpha=fitted if why is None else None,
        alpha_weighted=_number(row, "alpha_weighted") if why is None else None,
        log_norm=_number(row, "log_norm"),
        rand_distance=_number(row, "rand_distance", least=0.0),
        num_spikes=None if (spikes := _number(row, "num_spikes", least=0.0)) is None else int(spikes),
    )


_METRICS = (
    "alpha",
    "fitted_alpha",
    "sigma",
    "D",
    "tail",
    "xmin",
    "alpha_weighted",
    "log_norm",
    "rand_distance",
    "num_spikes",
)


def _metrics(why: str | None, eigenvalues: int = 0, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(_METRICS)
    return empty | values | {"eigenvalues": eigenvalues, "power_law": why is None, "why": why}


def _too_few(above: int, count: int, spec: SpectraSpec) -> str:
    return f"too few eigenvalues: {above} of {count} are above {SMALLEST:g}, fewer than {spec.min_evals}"


def _number(row: Mapping[str, Any], key: str, least: float | None = None) -> float | None:
    """Return a figure, None where weightwatcher has none: absent, not finite, or its -1 for a failure."""
    value = row.get(key)
    if value is None or not math.isfinite(float(value)) or (least is not None and float(value) < least):
        return None
    return float(value)
