"""The layer: a router and experts in the place of one MLP.

Shapes: B samples, L positions, T = B * L tokens, D width, E experts, S slots an expert.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wlsup.errors import WlsupError
from wlsup.moe.dispatch import choose_path, dispatch, run_batched
from wlsup.moe.hashing import HashRouter
from wlsup.moe.losses import balance_loss
from wlsup.moe.router import ExpertChoiceRouter, NoisyTopKRouter, Routed, TopKRouter
from wlsup.moe.soft import SoftRouter
from wlsup.moe.spec import MoESpec
from wlsup.moe.token_ids import TokenIds
from wlsup.ranks import global_sum

__all__ = ["MoE", "Routing", "auxiliary_losses", "update_biases"]

_PATIENCE = 1000  # forward passes in training without update_biases, after which it has been forgotten

_ROUTERS = {"top_k": TopKRouter, "noisy_top_k": NoisyTopKRouter, "expert_choice": ExpertChoiceRouter}


@dataclass(frozen=True)
class Routing:
    """What one forward pass did, for telemetry: tensors on the layer's device, without gradients.

    In training with several ranks, ``load``, ``probability``, ``entropy``, ``z`` and ``dropped`` are of all ranks.

    Args:
        load: (E,) each expert's share of the choices, before any is dropped; of soft, of the tokens' combine weights.
        probability: (E,) the router's mean probability of each; of hash the load.
        entropy: mean over tokens of the entropy of the router's probabilities, in nats: ln E if undecided; 0 of hash.
        dropped: share of the choices that found no room; of expert_choice, of the tokens that no expert took.
        max_logit: largest absolute logit; 0 of hash.
        z: mean squared logsumexp of the logits, what the z-loss presses down.
    """

    load: Tensor
    probability: Tensor
    entropy: Tensor
    dropped: Tensor
    max_logit: Tensor
    z: Tensor

    @property
    def load_entropy(self) -> Tensor:
        """Entropy of the load over ln E: 1 where even, 0 where one expert has all."""
        if len(self.load) == 1:
            return torch.ones_like(self.load[0])
        return torch.special.entr(self.load).sum() / math.log(len(self.load))

    @property
    def dead(self) -> Tensor:
        """How many experts got no token."""
        return (self.load == 0).sum()

    def scalars(self) -> dict[str, float]:
        """Return what telemetry draws, as numbers: one wait for the device."""
        named = {
            "entropy": self.entropy,
            "load_entropy": self.load_entropy,
            "load_max": self.load.max(),
            "load_min": self.load.min(),
            "dead": self.dead,
            "dropped": self.dropped,
            "max_logit": self.max_logit,
            "z": self.z,
        }
        values = torch.stack([value.to(torch.float32) for value in named.values()]).tolist()
        return dict(zip(named, values, strict=True))


class MoE(nn.Module):
    """A sparse mixture of experts: a token's output is the weighted sum of its experts' outputs.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", equation 1; the routers' own sources are in
    `MoESpec`. Keys: ``experts.<i>.*`` of each expert, ``router.*``.

    Args:
        experts: E modules of one kind from (N, D) to (N, D), with parameters of their own: no tensor is shared, and
            none is stacked (indexing a stacked parameter costs a gradient of its full size an expert).
        width: D.
        spec: routing, losses, dispatch.
        causal: the layer is part of an autoregressive model: routers by which a later token changes an earlier output
            are refused, and capacity is filled in the order of positions. How much of it there is goes by the sample's
            length, which is all that comes later of which an earlier output knows.
        vocabulary: of hash routing, the number of ids (`TokenIds.rows`).
        frequencies: (vocabulary,) of the balanced hash, how often each occurs.
        token_ids: where ids and padding mask are found when `forward` is not given them.
        number: which layer of its model it is: layers of one number draw the same jitter and noise where these depend
            on the step alone (`wlsup.draws.per_token`).

    Raises:
        WlsupError: experts that are not E, or not of their own; a router that is not causal where it must be; or what
            hash routing needs is missing.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        width: int,
        spec: MoESpec = MoESpec(),
        causal: bool = False,
        vocabulary: int | None = None,
        frequencies: Tensor | None = None,
        token_ids: TokenIds | None = None,
        number: int = 0,
    ) -> None:
        super().__init__()
        self.spec, self.width, self.causal, self.token_ids = spec, width, causal, token_ids
        self.experts = nn.ModuleList(experts)
        self._check_experts()
        if causal:
            spec.check_causal()
        if spec.router == "hash":
            self.router: nn.Module = HashRouter(spec, vocabulary, frequencies, causal)
        elif spec.router == "soft":
            self.router = SoftRouter(width, spec, number)
        else:
            self.router = _ROUTERS[spec.router](width, spec, causal, number)
        self.routing: Routing | None = None
        self._losses: dict[str, Tensor] = {}
        self._seen: Tensor | None = None  # choices on each expert since the last update of the bias
        self._passes = 0

    def forward(self, x: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Route, compute, combine.

        Args:
            x: (B, L, D), or (T, D), which counts as one sample.
            ids: (B, L) or (T,) token ids, for hash routing; None: those of ``token_ids``.
            mask: (B, L) or (T,), True or 1 at real tokens. Padding gives zeros, fills no expert's capacity, and counts
                in no loss. None: that of ``token_ids``, or all are real.

        Returns:
            As ``x``; in the experts' dtype under autocast.

        Raises:
            WlsupError: shapes do not fit, or the ids of hash routing are unknown.
        """
        if x.ndim not in (2, 3) or x.shape[-1] != self.width:
            raise WlsupError(f"This MoE layer takes (B, L, {self.width}) or (T, {self.width}), not {tuple(x.shape)}.")
        tokens = x if x.ndim == 3 else x[None]
        tokens, real = self._real(tokens, mask)
        if self.spec.router == "soft":
            return self._soft(tokens, real).view(x.shape)
        if self.spec.router == "hash":
            routed: Routed = self.router(self._ids(tokens, ids), real)
        else:
            routed = self.router(tokens, real)
        self._account(routed, real)
        path = choose_path(self.experts, x, self.spec.dispatch, routed.assignment.ceiling is not None)
        return dispatch(tokens.flatten(0, 1), routed.assignment, self.experts, path).view(x.shape)

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return the last forward pass's "balance" and "router_z", weighted; without those that the spec leaves out."""
        return dict(self._losses)

    @torch.no_grad()
    def update_bias(self, skipped: bool = False) -> None:
        """Move the balancing bias by what was routed since the last call; to be called after each optimizer step.

        Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1:
        b_e += u sign(mean load - load_e). It does nothing without ``balance: bias``, or where nothing was routed.

        Args:
            skipped: the step was not taken: forget what was routed.
        """
        if self.spec.balance == "bias" and self._seen is not None and not skipped:
            load = global_sum(self._seen)
            self.router.bias_steps += (load.mean() - load).sign().to(torch.int64)
        self._seen, self._passes = None, 0

    def extra_repr(self) -> str:
        """Name the mixture in ``print(model)``."""
        spec = self.spec
        return f"{spec.router}, k={spec.k}, combine={spec.combine}, capacity_factor={spec.capacity_factor}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last pass's graph out of copies."""
        return {**self.__dict__, "routing": None, "_losses": {}, "_seen": None}

    def _check_experts(self) -> None:
        wanted, given = self.spec.experts, len(self.experts)
        if given != wanted:
            raise WlsupError(f"moe.experts is {wanted}, and {given} experts were given. Give as many as the spec says.")
        kinds = {type(expert).__name__ for expert in self.experts}
        if len(kinds) > 1:
            raise WlsupError(f"Experts must be modules of one kind, not {', '.join(sorted(kinds))}.")
        tensors = [id(parameter) for expert in self.experts for parameter in expert.parameters()]
        if len(set(tensors)) < len(tensors) or len({id(expert) for expert in self.experts}) < given:
            raise WlsupError(
                "Experts share parameters: they could never differ. Give each its own (copy.deepcopy of one is enough)."
            )

    def _real(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens, zeros at padding, and (B, L) bool, False there."""
        batch, length, _ = tokens.shape
        if mask is None and self.token_ids is not None:
            mask = self.token_ids.find_mask(batch, length)
        if mask is None:
            return tokens, torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        if mask.numel() != batch * length:
            raise WlsupError(f"The mask must be {(batch, length)}, one of each token; it is {tuple(mask.shape)}.")
        real = mask.reshape(batch, length).to(device=tokens.device, dtype=torch.bool)
        # Attention leaves NaN at padding in places, and 0 * NaN is NaN.
        return tokens.masked_fill(~real[..., None], 0), real

    def _ids(self, tokens: Tensor, ids: Tensor | None) -> Tensor:
        batch, length, _ = tokens.shape
        if ids is None:
            if self.token_ids is None:
                raise WlsupError(
                    "Hash routing needs the tokens' ids: call the layer with ids=..., or make it with "
                    "token_ids=TokenIds(...)."
                )
            ids = self.token_ids.find(batch, length)
        if ids.numel() != batch * length:
            raise WlsupError(f"The ids must be {(batch, length)}, one of each token; they are {tuple(ids.shape)}.")
        return ids.reshape(batch, length)

    def _soft(self, tokens: Tensor, real: Tensor) -> Tensor:
        spec = self.spec
        filling, reading, logits = self.router(tokens, real)
        slots = torch.einsum("bld,bls->bsd", tokens, filling.to(tokens.dtype))
        own = slots.unflatten(1, (spec.experts, spec.slots)).transpose(0, 1).flatten(1, 2)  # (E, B S, D)
        path = spec.dispatch if spec.dispatch != "auto" else "batched" if tokens.is_cuda else "sort"
        if path in ("batched", "grouped"):
            outputs = run_batched(own, self.experts)
        else:
            outputs = torch.stack([expert(part) for expert, part in zip(self.experts, own, strict=True)])
        outputs = outputs.unflatten(1, (-1, spec.slots)).transpose(0, 1).flatten(1, 2)  # (B, E S, D)
        over_ranks = self._over_ranks()
        with torch.no_grad():
            weights = reading.unflatten(-1, (spec.experts, spec.slots)).sum(-1)
            entropy = (torch.special.entr(weights).sum(-1) * real).sum()
            squares = (logits.logsumexp(-1).square() * real).sum()
            own = torch.cat([weights.sum((0, 1)), torch.stack([real.sum(), entropy, squares])])
            load, (number, entropy, squares) = global_sum(own, over_ranks).split([spec.experts, 3])
            number = number.clamp_min(1)
            load = load / number
            self._losses = {}
            self.routing = Routing(
                load=load,
                probability=load,
                entropy=entropy / number,
                dropped=torch.zeros_like(load[0]),
                max_logit=_largest(logits.abs() * real[..., None]),
                z=squares / number,
            )
        return torch.einsum("bsd,bls->bld", outputs, reading.to(outputs.dtype))

    def _account(self, routed: Routed, real: Tensor) -> None:
        """Make losses and telemetry, over the ranks' tokens together in training."""
        spec, experts = self.spec, self.spec.experts
        if routed.logits is None:
            own = torch.cat([routed.chosen, torch.stack([routed.choices, routed.dropped])]).float()
            chosen, (choices, dropped) = global_sum(own, self._over_ranks()).split([experts, 2])
            share, dropped = chosen / choices.clamp_min(1), dropped / choices.clamp_min(1)
            zero = torch.zeros_like(share[0])
            self._losses = {}
            self.routing = Routing(share, share, zero, dropped, zero, zero)
            return
        logits = routed.logits
        log_probability = logits.log_softmax(-1)
        probability = log_probability.exp()
        dtype = torch.promote_types(logits.dtype, torch.float32)
        squares = (logits.logsumexp(-1).square() * real).sum()
        with torch.no_grad():
            entropy = (-(probability * log_probability).sum(-1) * real).sum()
            facts = torch.stack([real.sum(), routed.choices, routed.dropped, entropy.detach()]).to(dtype)
            chosen = routed.chosen.to(dtype)
        own = torch.cat([(probability * real[..., None]).sum((0, 1)).to(dtype), squares[None].to(dtype), chosen, facts])
        together = global_sum(own, self._over_ranks())
        summed, squares, chosen, facts = together.split([experts, 1, experts, 4])
        number, choices = facts[0].detach().clamp_min(1), facts[1].detach().clamp_min(1)
        load, mean, z = chosen.detach() / choices, summed / number, squares[0] / number
        self._losses = {}
        if spec.balance == "loss" and spec.learned:
            self._losses["balance"] = spec.balance_weight * balance_loss(load, mean)
        if spec.z_weight > 0:
            self._losses["router_z"] = spec.z_weight * z
        if spec.balance == "bias" and self.training:
            self._remember(routed.chosen)
        self.routing = Routing(
            load=load,
            probability=mean.detach(),
            entropy=(facts[3] / number).detach(),
            dropped=(facts[2] / (number if spec.router == "expert_choice" else choices)).detach(),
            max_logit=_largest(logits.detach().abs() * real[..., None]),
            z=z.detach(),
        )

    def _over_ranks(self) -> bool:
        """Whether to sum over ranks: in training only, since at evaluation they need not have equally many batches."""
        return self.training and torch.is_grad_enabled()

    def _remember(self, chosen: Tensor) -> None:
        own = chosen.to(torch.float32)
        self._seen = own if self._seen is None else self._seen + own
        self._passes += 1
        if self._passes == _PATIENCE:
            warnings.warn(
                f"{_PATIENCE} training passes and moe.balance: bias was never updated: call "
                "wlsup.moe.update_biases(model) after each optimizer step.",
                stacklevel=3,
            )


def auxiliary_losses(module: nn.Module) -> dict[str, Tensor]:
    """Return "balance" and "router_z" of all MoE layers in ``module``, each the sum over layers; {} without any.

    To be added to the loss. Each layer's are those of its last forward pass.
    """
    total: dict[str, Tensor] = {}
    for layer in module.modules():
        if isinstance(layer, MoE):
            for name, value in layer.auxiliary_losses().items():
                total[name] = total[name] + value if name in total else value
    return total


def update_biases(module: nn.Module, skipped: bool = False) -> None:
    """Move the balancing bias of all MoE layers in ``module``: to be called after each optimizer step.

    Args:
        module: the model.
        skipped: the step was not taken (a gradient was not finite): forget what was routed.
    """
    for layer in module.modules():
        if isinstance(layer, MoE):
            layer.update_bias(skipped)


def _largest(values: Tensor) -> Tensor:
    return values.amax() if values.numel() else values.new_zeros(())
