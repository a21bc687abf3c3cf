"""The exact k nearest neighbours by cosine similarity, in fp32, in bounded memory, the same on every backend.

A search in fp32 is exact but for rounding: two candidates for the last place whose similarities differ by less than
the rounding error may come out either way, by library and by processor. Such queries (about one in a thousand) are
decided in fp64, so that the neighbours are those of exact arithmetic. Equal similarities (duplicated pictures,
a collapsed encoder) go to the lower bank index.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from wlsup.errors import WlsupError, choose

__all__ = ["SIMILARITY_TOLERANCE", "Search", "full_precision", "nearest_neighbors", "normalize_"]

Search = Literal["auto", "faiss", "torch"]

# Above twice the largest rounding error of an fp32 inner product of unit vectors (4.6e-7 seen at widths up to 768).
SIMILARITY_TOLERANCE = 1e-6

_NORM_TOLERANCE = 1e-3
_QUERIES_CPU, _QUERIES_CUDA = 4096, 16384  # queries per search: faiss works in blocks of 4,096 queries by 1,024
_TILE_CPU, _TILE_CUDA = 2**21, 2**26  # similarities held at once: 8 MB and 256 MB
_SPARE = 8  # neighbours searched beyond the k asked for
_EXACT_VALUES = 2**20  # of neighbours in fp64 at once: 8 MB
_EXACT_QUERIES, _EXACT_BANK = 256, 1024  # rows per tile of the whole search in fp64: about 15 MB at width 768
_KEY_SCALE = 2**29  # similarities closer than 1 / 2**29 (1.9e-9) count as equal
_INDEX_MASK = 2**32 - 1


def normalize_(features: Tensor, block: int = 4096) -> Tensor:
    """Scale each row to unit length in place, without a copy of the whole; a row of zeros stays.

    Args:
        features: (n, D) floating point, changed.
        block: rows at a time.

    Returns:
        ``features``.
    """
    for rows in features.split(block):
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12)
        rows.div_(norms)
    return features


def nearest_neighbors(
    bank: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    *,
    search: Search = "auto",
    device: torch.device | str | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Find the k nearest bank rows of each query, for several k in one search; a few thousand queries at a time.

    Args:
        bank: (n, D) unit rows (or zero rows, which are at similarity 0 to all).
        queries: (m, D) unit rows.
        ks: neighbourhood sizes in 1..n; the set of the k nearest is settled at each of them.
        search: "faiss" (CPU only), "torch", or "auto": faiss where it is installed and the search is on the CPU.
        device: where to search; None for where ``bank`` lies. Tiles of the bank are moved there one at a time.

    Yields:
        ``(rows, similarities, indices)``: a slice of the queries, their similarities (r, max(ks)) in descending
        order, fp32, and bank indices (r, max(ks)), int64, both on the CPU.

    Raises:
        WlsupError: if shapes disagree, a k does not fit the bank, or a row is not finite or not of unit length.
    """
    _check(bank, queries, ks)
    device = torch.device(device) if device is not None else bank.device
    return _search(bank.detach(), queries.detach(), ks, device, _with_faiss(search, device))


def _search(
    bank: Tensor, queries: Tensor, ks: Sequence[int], device: torch.device, with_faiss: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    # Some neighbours more than asked for show whether the last place was close, and between whom.
    found = min(max(ks) + _SPARE, len(bank))
    step = _QUERIES_CUDA if device.type == "cuda" else _QUERIES_CPU
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        with torch.no_grad(), full_precision():
            if with_faiss:
                similarities, indices = _search_faiss(bank, queries[rows], found)
            else:
                similarities, indices = _search_torch(bank, queries[rows], found, device)
            _settle_ties(bank, queries[rows], similarities, indices, ks)
        yield rows, similarities[:, : max(ks)], indices[:, : max(ks)]


def _check(bank: Tensor, queries: Tensor, ks: Sequence[int]) -> None:
    for name, features in (("bank", bank), ("queries", queries)):
        if features.ndim != 2 or not features.is_floating_point():
            raise WlsupError(
                f"The k-NN {name} must be a floating point matrix (pictures, width), not {features.dtype} of shape "
                f"{tuple(features.shape)}."
            )
        if features.shape[0] == 0 or features.shape[1] == 0:
            raise WlsupError(f"The k-NN {name} is empty, of shape {tuple(features.shape)}. Check the eval set's split.")
    if bank.shape[1] != queries.shape[1]:
        raise WlsupError(
            f"The k-NN bank has features of width {bank.shape[1]} and the queries of width {queries.shape[1]}. "
            "Extract both with the same encoder."
        )
    if not ks or min(ks) < 1:
        raise WlsupError(f"k must be at least 1, not {list(ks)}.")
    if max(ks) > len(bank):
        raise WlsupError(f"k = {max(ks)} is more than the bank's {len(bank)} pictures. Set k to {len(bank)} or less.")
    _check_rows("bank", bank)
    _check_rows("queries", queries)


def _check_rows(name: str, features: Tensor, block: int = 4096) -> None:
    for start in range(0, len(features), block):
        norms = torch.linalg.vector_norm(features[start : start + block], dim=1)
        broken = ~norms.isfinite()
        if broken.any():
            row = start + int(broken.nonzero()[0])
            raise WlsupError(
                f"Row {row} of the k-NN {name} is NaN or infinite: the encoder has diverged, or was fed pictures that "
                "are not finite. Look at the loss curve and lower the learning rate."
            )
        # A row of zeros has no direction; it is left at similarity 0, so that a dead encoder scores and does not stop.
        wrong = ((norms - 1).abs() > _NORM_TOLERANCE) & (norms > 0)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise WlsupError(
                f"Row {start + row} of the k-NN {name} has length {float(norms[row]):.4g}, not 1. Extract features "
                "with normalize=True, or call wlsup.evaluation.neighbors.normalize_ on them."
            )


def _with_faiss(search: Search, device: torch.device) -> bool:
    choose("k-NN search", search, ("auto", "faiss", "torch"))
    there = importlib.util.find_spec("faiss") is not None
    if search == "faiss" and device.type != "cpu":
        raise WlsupError(f"search='faiss' runs on the CPU, not on {device}. Use search='auto'.")
    if search == "faiss" and not there:
        raise WlsupError("search='faiss' needs the package faiss-cpu, which is not installed. Use search='auto'.")
    return there and search != "torch" and device.type == "cpu"


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever autocast and the trainer's matmul precision say, and put both back."""
    matmuls = [getattr(getattr(torch.backends, name, None), "matmul", None) for name in ("cuda", "mkldnn")]
    matmuls = [matmul for matmul in matmuls if hasattr(matmul, "fp32_precision")]
    before: str | None
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through torch.backends.*.fp32_precision, which the older interface refuses to read
        before = None
    backends_before = [matmul.fp32_precision for matmul in matmuls]
    with torch.autocast("cpu", enabled=False), _autocast_off_on_cuda():
        try:
            if before is not None:
                torch.set_float32_matmul_precision("highest")
            for matmul in matmuls:
                matmul.fp32_precision = "ieee"
            yield
        finally:
            if before is not None:
                torch.set_float32_matmul_precision(before)
            for matmul, precision in zip(matmuls, backends_before, strict=True):
                matmul.fp32_precision = precision


def _autocast_off_on_cuda() -> torch.autocast | nullcontext:
    return torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()


def _search_faiss(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss  # after torch: the other order loads a second OpenMP, which slows one of the two or hangs

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        similarities, indices = faiss.knn(
            queries.to("cpu", torch.float32).contiguous().numpy(),
            bank.to("cpu", torch.float32).contiguous().numpy(),
            k,
            metric=faiss.METRIC_INNER_PRODUCT,
        )
    finally:
        faiss.omp_set_num_threads(threads)
    return torch.from_numpy(similarities), torch.from_numpy(indices)


def _search_torch(bank: Tensor, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Search by tiles, keeping the k best so far."""
    budget = _TILE_CUDA if device.type == "cuda" else _TILE_CPU
    width = min(len(bank), 65536 if device.type == "cuda" else 8192)
    height = max(1, budget // width)
    queries = queries.to(device, torch.float32)
    # One buffer for all products: allocated anew each time they would leave the heap in pieces.
    buffer = torch.empty(min(height, len(queries)) * width, device=device)
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(bank), width):
        tile = bank[start : start + width].to(device, torch.float32)
        parts = []
        for part in queries.split(height):
            products = buffer[: len(part) * len(tile)].view(len(part), len(tile))
            parts.append(torch.mm(part, tile.T, out=products).topk(min(k, len(tile)), dim=1))
        similarities = torch.cat([part[0] for part in parts])
        indices = torch.cat([part[1] for part in parts]) + start
        if best is not None:
            similarities, indices = (torch.cat(pair, 1) for pair in zip(best, (similarities, indices), strict=True))
            similarities, order = similarities.topk(min(k, similarities.shape[1]), dim=1)
            indices = indices.gather(1, order)
        best = similarities, indices
    return best[0].cpu(), best[1].cpu()


def _settle_ties(bank: Tensor, queries: Tensor, similarities: Tensor, indices: Tensor, ks: Sequence[int]) -> None:
    """Decide in fp64, in place, where the last place at one of ``ks`` was closer than rounding can tell."""
    close = torch.zeros(len(queries), dtype=torch.bool)
    unbounded = torch.zeros_like(close)  # others as close may be in the bank beyond those that were found
    for k in ks:
        if k < similarities.shape[1]:
            last = similarities[:, k - 1]
            contested = last - similarities[:, k] <= SIMILARITY_TOLERANCE
            close |= contested
            if similarities.shape[1] < len(bank):
                unbounded |= contested & (last - similarities[:, -1] <= SIMILARITY_TOLERANCE)
    found = similarities.shape[1]
    few = max(1, _EXACT_VALUES // (found * bank.shape[1]))
    for rows in (close & ~unbounded).nonzero().squeeze(1).split(few):
        similarities[rows], indices[rows] = _order_exactly(bank, queries[rows.to(queries.device)], indices[rows])
    for rows in (close & unbounded).nonzero().squeeze(1).split(_EXACT_QUERIES):
        similarities[rows], indices[rows] = _search_exactly(bank, queries[rows.to(queries.device)], found)


def _order_exactly(bank: Tensor, queries: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Order the given neighbours (r, K) by their similarity in fp64."""
    queries, indices = queries.to(bank.device, torch.float64), indices.to(bank.device)
    candidates = bank[indices].to(torch.float64)
    return _unpack(_pack(torch.einsum("rkd,rd->rk", candidates, queries), indices).sort(1, descending=True).values)


def _search_exactly(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search the whole bank in fp64."""
    queries = queries.to(bank.device, torch.float64)
    best: Tensor | None = None
    for start in range(0, len(bank), _EXACT_BANK):
        tile = bank[start : start + _EXACT_BANK].to(torch.float64)
        keys = _pack(queries @ tile.T, torch.arange(start, start + len(tile), device=bank.device))
        keys = keys if best is None else torch.cat([best, keys], 1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return _unpack(best)


def _pack(similarities: Tensor, indices: Tensor) -> Tensor:
    """Make one integer of each similarity and index, larger for the larger similarity and then the lower index.

    So that ``topk``, which promises no order among equals, meets none.
    """
    keys = similarities.mul(_KEY_SCALE).round_().to(torch.int64)
    return keys.bitwise_left_shift_(32).add_(_INDEX_MASK - indices)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    similarities = keys.bitwise_right_shift(32).to(torch.float64).div_(_KEY_SCALE)
    return similarities.float().cpu(), (_INDEX_MASK - keys.bitwise_and(_INDEX_MASK)).cpu()
