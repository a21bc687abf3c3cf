"""Routers: which experts a token goes to, and with which weight.

Shapes: B samples, L positions, D width, E experts, K choices a token, C tokens an expert takes of a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlsup.draws import per_token
from wlsup.moe.dispatch import Assignment, within_capacity
from wlsup.moe.spec import MoESpec

__all__ = ["ExpertChoiceRouter", "NoisyTopKRouter", "Routed", "TopKRouter", "combine_weights", "jittered", "slots_of"]


@dataclass(frozen=True)
class Routed:
    """A router's decision.

    Args:
        assignment: of the B L tokens, sample after sample.
        chosen: (E,) how many choices fell on each expert, before any was dropped.
        dropped: how many were dropped (of expert_choice: tokens that no expert took), a scalar.
        choices: how many there were, a scalar.
        logits: (B, L, E), without noise; None of a router that has none.
    """

    assignment: Assignment
    chosen: Tensor
    dropped: Tensor
    choices: Tensor
    logits: Tensor | None = None


def combine_weights(log_probability: Tensor, combine: str, chosen: Tensor | None = None) -> Tensor:
    """Return what the chosen experts' outputs are weighted by.

    Args:
        log_probability: (..., K) log p.
        combine: see `MoESpec`.
        chosen: (..., K) bool, False at those that are not chosen; what is returned there means nothing. None: all are.

    Returns:
        As ``log_probability``. "straight_through" is w' p / p', a prime meaning that no gradient passes and w being the
        renormalized weight.
    """
    if combine == "raw":
        return log_probability.exp()
    among = log_probability
    if chosen is not None:
        # Where none is chosen all are left in: a row of -inf has no softmax.
        among = among.masked_fill(~chosen & chosen.any(-1, keepdim=True), -math.inf)
    if combine == "renormalized":
        return among.softmax(-1)
    # p / p' by the logarithms: p itself may underflow.
    return among.detach().softmax(-1) * (log_probability - log_probability.detach()).exp()


def slots_of(real: int | Tensor, spec: MoESpec) -> Any:
    """Return how many of a sample's real tokens an expert takes: ceil(L k capacity_factor / E), at least 1.

    Args:
        real: L, or (B,) of them.
        spec: the mixture; no capacity_factor counts as 1.
    """
    factor = spec.k * (1.0 if spec.capacity_factor is None else spec.capacity_factor) / spec.experts
    # Rounding errors must not add a slot.
    if isinstance(real, int):
        return max(1, math.ceil(real * factor - 1e-6))
    wide = torch.float32 if real.device.type == "mps" else torch.float64
    return (real.to(wide) * factor - 1e-6).ceil().clamp_min(1).to(torch.int64)


class TopKRouter(nn.Module):
    """Each token goes to its k most probable experts.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1; Fedus et al. 2022, "Switch
    Transformers", section 2 (k = 1, float32, jitter, capacity). The softmax is over all experts, before the choice.

    Args:
        width: D.
        spec: the mixture.
        causal: the order in which capacity is filled; see `within_capacity`.
        number: of the layer, for its draws; see `MoE`.
    """

    def __init__(self, width: int, spec: MoESpec, causal: bool = False, number: int = 0) -> None:
        super().__init__()
        self.spec, self.causal, self.number = spec, causal, number
        self.weight = nn.Parameter(torch.empty(spec.experts, width))
        nn.init.normal_(self.weight, std=spec.init_std)
        if spec.balance == "bias":
            # Whole numbers, since half precision would swallow steps of 1e-3.
            self.register_buffer("bias_steps", torch.zeros(spec.experts, dtype=torch.int64))

    @property
    def bias(self) -> Tensor:
        """(E,) what is added to the probabilities for choosing, with ``balance: bias``."""
        return self.spec.bias_rate * self.bias_steps

    def read(self, x: Tensor) -> Tensor:
        """Return x in the router's dtype, in training with its jitter."""
        if self.spec.router_dtype == "float32":
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return jittered(x, self.spec.jitter, self.number) if self.training else x

    def logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """(B, L, D) from `read` -> (B, L, E), in float32 (of float64 in float64) unless `router_dtype` is "model"."""
        weight = self.weight if weight is None else weight
        if self.spec.router_dtype == "model":
            return F.linear(x.to(weight.dtype), weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(x.dtype))

    def choosing(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return the logits that the choice and its weights are made of."""
        return logits

    def forward(self, x: Tensor, mask: Tensor) -> Routed:
        """Route.

        Args:
            x: (B, L, D).
            mask: (B, L) bool, False at padding.
        """
        spec, (batch, length, _) = self.spec, x.shape
        x = self.read(x)
        logits = self.logits(x)
        log_probability = self.choosing(x, logits).log_softmax(-1)
        score = log_probability.detach()
        if spec.balance == "bias":
            score = score.exp() + self.bias
        expert = score.topk(spec.k, dim=-1).indices
        weight = combine_weights(log_probability.gather(-1, expert), spec.combine)
        expert = expert.masked_fill(~mask[..., None], spec.experts)
        chosen = count(expert, spec.experts)
        kept, ceiling = expert < spec.experts, None
        if spec.capacity_factor is not None:
            kept = within_capacity(expert, spec.experts, slots_of(mask.sum(1), spec), self.causal)
            ceiling = batch * min(length, slots_of(length, spec))
        token = torch.arange(batch * length, device=x.device).repeat_interleave(spec.k)
        going = torch.where(kept, expert, spec.experts)
        choices = mask.sum() * spec.k
        return Routed(
            Assignment(token, going.flatten(), weight.flatten(), ceiling),
            chosen,
            choices - kept.sum(),
            choices,
            logits,
        )


class NoisyTopKRouter(TopKRouter):
    """Top-k of logits with Gaussian noise, in training.

    Source: Shazeer et al. 2017, equations 3 to 5: x W_g + n softplus(x W_noise), W_noise 0 at first (the paper's start
    of W_g at 0 as well is not taken over: without the noise, at evaluation, all logits would tie). With fixed noise,
    Riquelme et al. 2021, "V-MoE", section 2.1: standard deviation 1 / E.

    Args:
        width: D.
        spec: the mixture.
        causal: see `TopKRouter`.
        number: see `TopKRouter`.
    """

    def __init__(self, width: int, spec: MoESpec, causal: bool = False, number: int = 0) -> None:
        super().__init__(width, spec, causal, number)
        self.noise = nn.Parameter(torch.zeros(spec.experts, width)) if spec.noise == "learned" else None

    def choosing(self, x: Tensor, logits: Tensor) -> Tensor:
        """Add the noise."""
        if not self.training:
            return logits
        deviation = 1 / self.spec.experts if self.noise is None else F.softplus(self.logits(x, self.noise))
        # the quantile function of the normal distribution
        normal = math.sqrt(2) * torch.special.erfinv(2 * per_token(logits, self.number, "noise") - 1)
        return logits + normal.to(logits.dtype) * deviation


class ExpertChoiceRouter(TopKRouter):
    """Each expert takes the C = ceil(L k capacity_factor / E) tokens of a sample that are most probably its own.

    Source: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2. There it takes them from the
    whole batch, here from each sample, so that a picture's features do not depend on the pictures beside it. A token
    may be taken by several experts, or by none and then gives zeros. "renormalized" is over the experts that took it.
    """

    def forward(self, x: Tensor, mask: Tensor) -> Routed:
        """Route; arguments as `TopKRouter.forward`."""
        spec, (batch, length, _) = self.spec, x.shape
        logits = self.logits(self.read(x))
        log_probability = logits.log_softmax(-1)
        real = mask.sum(1)
        most = min(length, slots_of(length, spec))
        score = log_probability.detach().masked_fill(~mask[..., None], -math.inf).transpose(1, 2)
        position = score.topk(most, dim=-1).indices  # (B, E, C)
        # Shorter samples have fewer slots, and padding comes last.
        within = torch.arange(most, device=x.device) < slots_of(real, spec).minimum(real)[:, None, None]
        within = within.expand(-1, spec.experts, -1)
        taken = torch.zeros_like(score, dtype=torch.bool).scatter(2, position, within).transpose(1, 2)  # (B, L, E)
        weight = combine_weights(log_probability, spec.combine, taken)
        own = torch.arange(spec.experts, device=x.device)[None, :, None]
        first = torch.arange(batch, device=x.device)[:, None, None] * length
        return Routed(
            Assignment(
                (first + position).flatten(),
                torch.where(within, own, spec.experts).flatten(),
                weight.transpose(1, 2).gather(2, position).flatten(),
                batch * most,
            ),
            within.sum((0, 2)),
            (mask & ~taken.any(-1)).sum(),
            mask.sum(),
            logits,
        )


def jittered(x: Tensor, jitter: float, number: int) -> Tensor:
    """Multiply each number of (B, L, D) by one from U(1 - jitter, 1 + jitter); Fedus et al. 2022, section 2.2.

    Args:
        x: (B, L, D).
        jitter: 0 changes nothing.
        number: of the layer.
    """
    if jitter == 0:
        return x
    return x * (1 - jitter + 2 * jitter * per_token(x, number, "jitter")).to(x.dtype)


def count(expert: Tensor, experts: int) -> Tensor:
    """Return (E,) how often each expert stands in ``expert``; E itself is not counted."""
    flat = expert.flatten()
    return torch.zeros(experts + 1, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))[
        :-1
    ]
