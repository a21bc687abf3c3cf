"""Hash routing: a fixed table from token ids to experts, chosen before training.

Shapes: V ids, E experts, K choices an id, B samples, L positions.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from wlsup.errors import WlsupError
from wlsup.moe.dispatch import Assignment, within_capacity
from wlsup.moe.router import Routed, count, slots_of
from wlsup.moe.spec import MoESpec
from wlsup.moe.token_ids import TokenIds

__all__ = ["HashRouter", "balanced_table", "random_table", "token_frequencies"]


def random_table(ids: int, experts: int, k: int = 1, seed: int = 0) -> Tensor:
    """Draw k different experts for each id.

    Source: Roller et al. 2021, "Hash Layers for Large Sparse Models", section 3.1 (random hash).

    Args:
        ids: V.
        experts: E.
        k: K.
        seed: of a generator of its own; torch's global one is neither read nor set.

    Returns:
        (V, K) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(ids, experts, generator=generator).argsort(1)[:, :k].contiguous()


def balanced_table(frequencies: Tensor, experts: int, k: int = 1, seed: int = 0) -> Tensor:
    """Give each id, the most frequent first, the k experts with the least to do so far.

    Source: Roller et al. 2021, section 3.1 (balanced assignment). Ids that never occur are spread evenly by number.

    Args:
        frequencies: (V,) how often each id occurs, >= 0.
        experts: E.
        k: K.
        seed: of the order among ids of equal frequency.

    Returns:
        (V, K) int64.
    """
    order = torch.randperm(len(frequencies), generator=torch.Generator().manual_seed(seed))
    order = order[frequencies.cpu()[order].argsort(descending=True, stable=True)]
    ordered = frequencies.cpu().double()[order]
    table = torch.empty(len(order), k, dtype=torch.int64)
    if bool((ordered == ordered[:1]).all()):  # the emptiest are the next ones, round and round
        table[order] = (torch.arange(len(order) * k) % experts).view(-1, k)
        return table
    chosen, load = [], [(0.0, 0, expert) for expert in range(experts)]  # occurrences, ids, number
    for frequency in ordered.tolist():
        emptiest = [heapq.heappop(load) for _ in range(k)]
        chosen.append([expert for _, _, expert in emptiest])
        for occurrences, ids, expert in emptiest:
            heapq.heappush(load, (occurrences + frequency, ids + 1, expert))
    table[order] = torch.tensor(chosen)
    return table


def token_frequencies(captions: Iterable[Tensor], token_ids: TokenIds) -> Tensor:
    """Count the ids of a corpus, and one of each prefix position a caption.

    Args:
        captions: of each caption the ids, without padding.
        token_ids: how many ids there are.

    Returns:
        (V + P,) float64: what `MoE` takes as ``frequencies``.
    """
    total = torch.zeros(token_ids.rows, dtype=torch.float64)
    prefix = total[token_ids.vocabulary :]
    for ids in captions:
        own = ids.flatten().cpu()
        total.index_add_(0, own, torch.ones(len(own), dtype=total.dtype))
        prefix += 1
    return total


class HashRouter(nn.Module):
    """The table's experts for each token id, each weighted by 1 / k. Nothing to learn, nothing to balance; causal.

    Source: Roller et al. 2021, section 3. The table is in the state dict: a checkpoint routes as it was trained.

    Args:
        spec: the mixture.
        ids: V, number of ids that may come (`TokenIds.rows`).
        frequencies: (V,), for the balanced table.
        causal: the order in which capacity is filled; see `within_capacity`.

    Raises:
        WlsupError: the number of ids or their frequencies are missing, or do not fit.
    """

    def __init__(self, spec: MoESpec, ids: int | None, frequencies: Tensor | None = None, causal: bool = False) -> None:
        super().__init__()
        if ids is None or ids < 1:
            raise WlsupError(
                "moe.router: hash needs to know how many token ids there are: MoE(..., vocabulary=token_ids.rows)."
            )
        if spec.hash == "balanced":
            if frequencies is None or frequencies.shape != (ids,) or bool((frequencies < 0).any()):
                given = "none" if frequencies is None else tuple(frequencies.shape)
                raise WlsupError(
                    f"moe.hash: balanced needs how often each of the {ids} ids occurs, (V,) numbers >= 0; given: "
                    f"{given}. Count them with wlsup.moe.token_frequencies, or set moe.hash to random."
                )
            table = balanced_table(frequencies, spec.experts, spec.k, spec.hash_seed)
        else:
            table = random_table(ids, spec.experts, spec.k, spec.hash_seed)
        self.spec, self.causal = spec, causal
        self.register_buffer("table", table)

    def forward(self, ids: Tensor, mask: Tensor) -> Routed:
        """Route.

        Args:
            ids: (B, L), each below V.
            mask: (B, L) bool, False at padding.
        """
        spec = self.spec
        batch, length = ids.shape
        expert = self.table[ids.to(self.table.device)].masked_fill(~mask[..., None], spec.experts)
        chosen = count(expert, spec.experts)
        kept, ceiling = expert < spec.experts, None
        if spec.capacity_factor is not None:
            kept = within_capacity(expert, spec.experts, slots_of(mask.sum(1), spec), self.causal)
            ceiling = batch * min(length, slots_of(length, spec))
        token = torch.arange(batch * length, device=expert.device).repeat_interleave(spec.k)
        going = torch.where(kept, expert, spec.experts).flatten()
        weight = torch.full(going.shape, 1 / spec.k, device=expert.device)
        choices = mask.sum() * spec.k
        return Routed(Assignment(token, going, weight, ceiling), chosen, choices - kept.sum(), choices)
