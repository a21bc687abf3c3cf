"""Cluster-aware upcycling: experts that differ from the first step, each for its own part of the activation space.

Shapes: N calibration tokens, D width, E experts, I and O inputs and outputs of a linear map, r its rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.errors import WlsupError
from wlsup.moe.layer import MoE
from wlsup.moe.sites import inputs_of, language_model_of, layout_of, sites_of, weight_of

__all__ = ["ClusterReport", "ClusterSpec", "activations", "low_rank", "specialise", "spherical_k_means"]

_ROUNDS = 100  # of spherical k-means; it stops when no token moves


@dataclass(frozen=True)
class ClusterSpec:
    """How experts and router are made of clusters.

    Args:
        energy: share of the spectral energy (sum of squared singular values) that each expert's maps keep on its
            cluster, in (0, 1]; 1 keeps the copies whole, and with them the dense function. The default is ours.
        tokens: calibration tokens of a layer at most, drawn without replacement.
        output: also project the map that writes the output, on the cluster's hidden activations; False: only the maps
            that read the input.
        seed: of the draw and of k-means.
    """

    energy: float = 0.99
    tokens: int = 16384
    output: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1 or self.tokens < 1:
            raise WlsupError(
                f"Clusters need an energy in (0, 1] and at least 1 token, not {self.energy:g} and {self.tokens}."
            )


@dataclass
class ClusterReport:
    """What `specialise` made of one layer.

    Args:
        shares: share of the calibration tokens in each expert's cluster.
        ranks: for each linear map by name, each expert's rank.
        error: relative error of the layer's output on the calibration tokens against the dense MLP's.
    """

    shares: list[float]
    ranks: dict[str, list[int]]
    error: float


@torch.no_grad()
def activations(
    module: nn.Module,
    blocks: Sequence[int],
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    tokens: int = ClusterSpec.tokens,
) -> dict[str, Tensor]:
    """Collect what the dense MLPs of some blocks read.

    Args:
        module: the dense model, before it is upcycled; run in eval mode, and left as it was.
        blocks: positions of the blocks.
        batches: pictures (B, 3, H, W), normalised, for a vision encoder; (ids, mask), (B, L) each, for a language
            model, where padding is left out. No more are read than needed.
        tokens: enough when there are so many.

    Returns:
        (N, D) by the name of each block's MLP, on the CPU.

    Raises:
        WlsupError: no batch, or blocks without a dense MLP.
    """
    sites = sites_of(module, blocks)
    device = next(module.parameters()).device
    kept: list[list[Tensor]] = [[] for _ in sites]
    count = 0
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        for batch in batches:
            with inputs_of(sites) as seen:
                mask = _run(module, batch, device)
            for inputs, store in zip(seen, kept, strict=True):
                rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
                store.append((rows if mask is None else rows[mask.reshape(-1)]).cpu())
            count += len(kept[0][-1])
            if count >= tokens:
                break
    finally:
        for part, training in modes.items():
            part.training = training
    if not count:
        raise WlsupError("Clusters need calibration data, and there was none: give pictures or texts.")
    return {site.name: torch.cat(store) for site, store in zip(sites, kept, strict=True)}


@torch.no_grad()
def specialise(layer: MoE, inputs: Tensor, spec: ClusterSpec = ClusterSpec()) -> ClusterReport:
    """Make the identical experts of a freshly upcycled layer differ, and its router know which is for what.

    Source: Chu et al. 2026, "Enhancing Mixture-of-Experts Specialization via Cluster-Aware Upcycling" (CVPR;
    arXiv:2604.13508): the MLP's input activations are parted into E clusters by cosine similarity; the router's weights
    are the normalised centroids; expert i's weights are the truncated SVD of ``W S_i`` times the inverse of ``S_i``,
    where ``S_i S_i^T = X_i X_i^T`` over the cluster's tokens, its rank set by a share of spectral energy. Ours: both
    linear maps of the MLP are projected, the second on its own inputs (`ClusterSpec.output`); the threshold's default;
    the start of k-means. Their training loss (self-distillation from the ensemble of experts) is not part of this.

    Args:
        layer: of `upcycle`, changed in place.
        inputs: (N, D) of `activations`.
        spec: how.

    Returns:
        Shares, ranks and the relative error that the projection costs: the function is kept up to it.

    Raises:
        WlsupError: a router without a weight an expert (hash, soft), fewer tokens than experts, or experts that are no
            MLPs.
    """
    if layer.spec.router in ("hash", "soft"):
        raise WlsupError(
            f"Clusters set the router's weights, one row an expert, which {layer.spec.router!r} routing does not have. "
            "Choose top_k, noisy_top_k or expert_choice."
        )
    experts = list(layer.experts)
    layout = layout_of(experts[0])
    if layout is None:
        raise WlsupError(f"Clusters make low-rank parts of MLPs; a {type(experts[0]).__name__} is none that is known.")
    reads, writes = layout
    parameter = next(experts[0].parameters())
    inputs = inputs.to(parameter.device, parameter.dtype)
    if len(inputs) > spec.tokens:
        inputs = inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(spec.seed))[: spec.tokens]]
    centroids, chosen = spherical_k_means(inputs, len(experts), spec.seed)
    chosen = chosen.to(inputs.device)
    dense, before = (
        experts[0](inputs),
        {name: weight_of(getattr(experts[0], name)).clone() for name in (*reads, writes)},
    )
    hidden = _inputs_of_output(experts[0], writes, inputs) if spec.output else None
    ranks: dict[str, list[int]] = {name: [] for name in (*reads, *([writes] if spec.output else []))}
    for index, expert in enumerate(experts):
        members = chosen == index
        for name, of_expert in ranks.items():
            rows = (hidden if name == writes else inputs)[members]
            weight, rank = low_rank(before[name], rows, spec.energy)
            weight_of(getattr(expert, name)).copy_(weight)
            of_expert.append(rank)
    layer.router.weight.copy_(centroids)
    shares = torch.bincount(chosen, minlength=len(experts)) / len(chosen)
    return ClusterReport(shares.tolist(), ranks, _relative_error(_computed(layer, inputs), dense))


def low_rank(weight: Tensor, inputs: Tensor, energy: float) -> tuple[Tensor, int]:
    """Project a linear map onto what it does to some inputs.

    The truncated SVD of ``W S`` times the inverse of ``S``, with ``S S^T = X X^T``, is ``U_r U_r^T W``, where ``U_r``
    holds the first r left singular vectors of ``W X``: the whitening cancels, and nothing needs inverting, so that
    clusters with fewer tokens than channels are no special case.

    Args:
        weight: (O, I).
        inputs: (N, I), uncentred.
        energy: r is the smallest rank with this share of the sum of squared singular values of ``W X``.

    Returns:
        (O, I) of the weight's dtype, and r. Energy 1, or no inputs, gives the weight itself, bit for bit.
    """
    full = min(weight.shape)
    if energy == 1 or not len(inputs):
        return weight, full
    matrix, x = weight.double(), inputs.double()
    if weight.shape[0] <= weight.shape[1]:
        written = x @ matrix.T
        values, vectors = torch.linalg.eigh(written.T @ written)
        values, vectors = values.flip(0), vectors.flip(1)
    else:  # O x O would be larger than need be: a root of the I x I second moment does as well
        moment, axes = torch.linalg.eigh(x.T @ x)
        root = axes * moment.clamp_min(0).sqrt()
        vectors, singular, _ = torch.linalg.svd(matrix @ root, full_matrices=False)
        values = singular.square()
    values = values.clamp_min(0)
    if not values[0] > 0:  # the map does nothing here
        return weight, full
    rank = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    rank = min(rank, full)
    axes = vectors[:, :rank]
    return (axes @ (axes.T @ matrix)).to(weight.dtype), rank


def spherical_k_means(inputs: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Part tokens by the direction they point in, as a router's logits do.

    Source: Dhillon & Modha 2001, "Concept decompositions for large sparse text data using clustering". The start,
    scikit-learn's k-means on the unit vectors, is ours.

    Args:
        inputs: (N, D).
        clusters: E.
        seed: of the start.

    Returns:
        Unit centroids (E, D) in fp32, and the cluster (N,) of each token: that of the centroid it is nearest to.

    Raises:
        WlsupError: fewer tokens than clusters.
    """
    from sklearn.cluster import KMeans

    if len(inputs) < clusters:
        raise WlsupError(f"{len(inputs)} calibration tokens cannot make {clusters} clusters: give more data.")
    unit = F.normalize(inputs.float().cpu(), dim=1)
    start = KMeans(clusters, n_init=4, random_state=seed).fit(unit.numpy())
    centroids = F.normalize(torch.from_numpy(start.cluster_centers_).float(), dim=1)
    chosen = (unit @ centroids.T).argmax(1)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centroids).index_add_(0, chosen, unit)
        # An empty cluster keeps its centroid.
        filled = torch.bincount(chosen, minlength=clusters) > 0
        centroids = torch.where(filled[:, None], F.normalize(sums, dim=1), centroids)
        before, chosen = chosen, (unit @ centroids.T).argmax(1)
        if torch.equal(before, chosen):
            break
    return centroids, chosen


def _run(module: nn.Module, batch: Any, device: torch.device) -> Tensor | None:
    """Run one batch; return which of its tokens are real, None for all."""
    model = language_model_of(module)
    if model is None:
        module(batch.to(device))
        return None
    ids, mask = (part.to(device) for part in batch)
    model.base_model(input_ids=ids, attention_mask=mask.to(torch.int64), use_cache=False)
    return mask.bool()


def _inputs_of_output(expert: nn.Module, writes: str, inputs: Tensor) -> Tensor:
    """(N, D) -> (N, H): what the map that writes the output reads."""
    seen: list[Tensor] = []
    handle = getattr(expert, writes).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        expert(inputs)
    finally:
        handle.remove()
    return seen[0]


def _computed(layer: MoE, inputs: Tensor) -> Tensor:
    """(N, D) -> (N, D) in eval mode, leaving the layer as it was."""
    training = layer.training
    layer.eval()
    try:
        return layer(inputs)
    finally:
        layer.train(training)


def _relative_error(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).norm() / wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny))
