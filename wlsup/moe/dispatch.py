"""Bringing tokens to their experts and the results back: four ways of computing the same.

Shapes: T tokens, E experts, K choices a token, S choices in all, B samples, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlsup.errors import WlsupError
from wlsup.moe.experts import MLPParts, parts_of, stack

__all__ = ["Assignment", "choose_path", "dispatch", "run_batched", "within_capacity"]

_ROW = 16
"""Bytes, of which the grouped product wants every matrix's rows to be multiples."""


@dataclass(frozen=True)
class Assignment:
    """Which expert gets which token, a row a choice.

    Args:
        token: (S,) the token's number, below T.
        expert: (S,) the expert's number; E for a choice that is dropped, or of padding: nobody computes it.
        weight: (S,) what the expert's output is multiplied by.
        ceiling: the most that one expert can have got, where that is known beforehand (capacity); else None.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    ceiling: int | None = None


def within_capacity(expert: Tensor, experts: int, slots: Tensor, by_position: bool) -> Tensor:
    """Say which choices find room, experts being filled in a fixed order, sample by sample.

    In an autoregressive model they must be filled ``by_position``: all choices of a token before any of the next one's.
    Elsewhere all first choices come before any second one (Fedus et al. 2022; Riquelme et al. 2021), which lets a later
    token's first choice push out an earlier one's second.

    Args:
        expert: (B, L, K) the choices; E at padding, which takes no room.
        experts: E.
        slots: (B,) room on each expert.
        by_position: the order.

    Returns:
        (B, L, K) bool; False at padding.
    """
    batch, length, k = expert.shape
    ordered = expert.flatten(1) if by_position else expert.transpose(1, 2).flatten(1)
    taken = F.one_hot(ordered, experts + 1).cumsum(1)
    place = taken.gather(2, ordered[..., None])[..., 0]  # 1 for the first on its expert
    kept = (place <= slots[:, None]) & (ordered < experts)
    return kept.view(batch, length, k) if by_position else kept.view(batch, k, length).transpose(1, 2)


def choose_path(experts: Sequence[nn.Module], x: Tensor, wanted: str, bounded: bool) -> str:
    """Say which path computes.

    "auto": grouped where the device has tensor cores that torch's grouped product is written for (bfloat16, compute
    capability 8 or more) and the experts are MLPs of widths that it takes, multiples of 8; on other GPUs batched where
    the capacity bounds the padding; else sort, with one wait of the CPU for the GPU a layer.

    Args:
        experts: E modules.
        x: (T, D).
        wanted: `MoESpec.dispatch`.
        bounded: whether capacity bounds what an expert gets.
    """
    if wanted != "auto":
        return wanted
    if x.device.type != "cuda":
        return "sort"
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    able = hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(x.device) >= (8, 0)
    if able and dtype == torch.bfloat16 and all(_fits(parts_of(expert), dtype) for expert in experts):
        return "grouped"
    return "batched" if bounded else "sort"


def dispatch(x: Tensor, assignment: Assignment, experts: Sequence[nn.Module], path: str = "sort") -> Tensor:
    """Return for each token the weighted sum of its experts' outputs; zeros for a token that has none.

    Args:
        x: (T, D).
        assignment: who gets what.
        experts: E modules from (N, D) to (N, D), parameters of their own. All of them run, if on no row at all, so that
            each has a gradient (zero): DistributedDataParallel asks for that.
        path: "sort", "grouped", "batched" or "loop".

    Returns:
        (T, D) in the experts' dtype.

    Raises:
        WlsupError: "grouped" with experts that are no MLPs or of widths that it does not take, or a torch without it.
    """
    if path == "loop":
        return _loop(x, assignment, experts)
    # Stable: an expert's rows keep the tokens' order, so that the result does not depend on the sort's implementation.
    ranked, order = assignment.expert.sort(stable=True)
    counts = torch.zeros(len(experts) + 1, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add_(0, ranked, torch.ones_like(ranked))[:-1]
    if path == "sort":
        sizes = counts.tolist()  # the one place where the CPU waits for a GPU
        order = order[: sum(sizes)]
        token = assignment.token[order]
        rows = x.index_select(0, token)
        parts = rows.split(sizes)
        # The busiest expert last, so that backward begins with it, and what it keeps is gone when other gradients come.
        results = {e: experts[e](parts[e]) for e in sorted(range(len(sizes)), key=sizes.__getitem__)}
        outputs = torch.cat([results[e] for e in range(len(sizes))])
    elif path == "grouped":
        token = assignment.token[order]
        outputs = _grouped(x.index_select(0, token), ranked, counts, experts)
    else:
        token = assignment.token[order]
        outputs = _batched(x.index_select(0, token), ranked, counts, experts, assignment.ceiling)
    weighted = outputs * assignment.weight[order].to(outputs.dtype)[:, None]
    return outputs.new_zeros(len(x), outputs.shape[-1]).index_add(0, token, weighted)


def run_batched(slots: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """Run each expert on its own slots, (E, N, D) -> (E, N, D); MLPs together, others one after another."""
    parts = stack(experts, _computed_in(slots))
    if parts is None:
        return torch.stack([expert(own) for expert, own in zip(experts, slots, strict=True)])
    return _mlp(slots, parts, lambda rows, weight: rows @ weight.transpose(1, 2), lambda bias: bias[:, None])


def _loop(x: Tensor, assignment: Assignment, experts: Sequence[nn.Module]) -> Tensor:
    total: Tensor | None = None
    for number, expert in enumerate(experts):
        chosen = (assignment.expert == number).nonzero()[:, 0]
        token = assignment.token[chosen]
        output = expert(x[token])
        weighted = output * assignment.weight[chosen].to(output.dtype)[:, None]
        if total is None:
            total = output.new_zeros(len(x), output.shape[-1])
        total = total.index_add(0, token, weighted)
    return total


def _grouped(rows: Tensor, ranked: Tensor, counts: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """Rows in the order of their experts -> outputs, without the CPU waiting for the GPU."""
    cast = _computed_in(rows, next(experts[0].parameters()).dtype)
    parts = stack(experts, cast)
    if parts is None or not hasattr(F, "grouped_mm"):
        raise WlsupError(
            "moe.dispatch: grouped needs experts that are MLPs (MLPExpert, or timm's and transformers' own) without "
            "dropout, and a torch with grouped_mm (2.10 or later). Use moe.dispatch: auto."
        )
    if not _fits(parts, cast):
        raise WlsupError(
            f"moe.dispatch: grouped takes experts whose widths are multiples of {_ROW // cast.itemsize} in "
            f"{str(cast).removeprefix('torch.')}, and these map {parts.up.shape[-1]} channels to "
            f"{parts.up.shape[-2]}. Use moe.dispatch: auto, or choose another width."
        )
    # Dropped choices and padding, which come last, are the last expert's to compute: behind the last group there would
    # be uninitialised memory, in the backward pass too.
    owner = ranked.clamp_max(len(experts) - 1)
    ends = counts.cumsum(0).to(torch.int32)
    ends[-1:].fill_(len(rows))  # by index it would be a copy from the CPU, which waits
    # A bias by a product, not by indexing: the gradient of that is summed row by row, an expert after the other.
    whose = F.one_hot(owner, len(experts)).to(cast)
    outputs = _mlp(
        rows.to(cast),
        parts,
        lambda rows, weight: F.grouped_mm(rows, weight.transpose(1, 2), offs=ends),
        lambda bias: whose @ bias,
    )
    return outputs.masked_fill((ranked == len(experts))[:, None], 0)


def _fits(parts: MLPParts | None, dtype: torch.dtype) -> bool:
    """Whether the grouped product takes these matrices: MLPs whose rows, both ways, are whole multiples of 16 bytes."""
    return parts is not None and all(size * dtype.itemsize % _ROW == 0 for size in parts.up.shape[-2:])


def _batched(rows: Tensor, ranked: Tensor, counts: Tensor, experts: Sequence[nn.Module], ceiling: int | None) -> Tensor:
    """Rows in the order of their experts -> outputs, experts padded to equal length."""
    length = int(counts.max()) if ceiling is None else ceiling
    starts = counts.cumsum(0) - counts
    owner = ranked.clamp_max(len(experts) - 1)
    kept = ranked < len(experts)
    place = torch.arange(len(rows), device=rows.device) - starts[owner]
    # Dropped choices all write to, and read, one row behind the last.
    place = torch.where(kept, owner * length + place, len(experts) * length)
    padded = rows.new_zeros(len(experts) * length + 1, rows.shape[1]).index_copy(0, place, rows)
    outputs = run_batched(padded[:-1].view(len(experts), length, -1), experts).flatten(0, 1)
    outputs = torch.cat([outputs, outputs.new_zeros(1, outputs.shape[1])])
    return outputs.index_select(0, place)


def _computed_in(rows: Tensor, otherwise: torch.dtype | None = None) -> torch.dtype:
    """Return autocast's dtype where it is on (it does not know the grouped product); else the one given, or rows'."""
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return rows.dtype if otherwise is None else otherwise


def _mlp(rows: Tensor, parts: MLPParts, product, spread) -> Tensor:  # noqa: ANN001
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = product(x, weight)
        return y if bias is None else y + spread(bias).to(y.dtype)

    hidden = linear(rows, parts.up, parts.up_bias)
    if parts.gate is None:
        hidden = parts.activation(hidden)
    else:
        hidden = parts.activation(linear(rows, parts.gate, parts.gate_bias)) * hidden
    return linear(hidden, parts.down, parts.down_bias)
