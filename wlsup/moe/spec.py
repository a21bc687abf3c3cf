"""What a mixture of experts is: its router, its combine, its dispatch and its losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from wlsup.errors import WlsupError, choose

__all__ = ["MoESpec"]

RouterName = Literal["top_k", "noisy_top_k", "expert_choice", "soft", "hash"]
Combine = Literal["straight_through", "renormalized", "raw"]
Dispatch = Literal["auto", "sort", "grouped", "batched", "loop"]

_WHY_NOT_CAUSAL = {
    "expert_choice": "each expert picks its tokens from the whole sequence, so that a later token can push an earlier "
    "one out",
    "soft": "each expert reads mixtures of the whole sequence",
}

_BY_LOGITS = ("top_k", "noisy_top_k", "expert_choice")
_READ_BY: dict[str, tuple[str, ...]] = {
    "combine": _BY_LOGITS,
    "bias_rate": ("top_k", "noisy_top_k"),
    "jitter": (*_BY_LOGITS, "soft"),
    "router_dtype": (*_BY_LOGITS, "soft"),
    "noise": ("noisy_top_k",),
    "hash": ("hash",),
    "hash_seed": ("hash",),
    "slots": ("soft",),
}
"""Which routers read an option. Not here: k, capacity_factor and balance, whose errors say more, and balance_weight,
z_weight and init_std, which comparisons of routers set once for all."""

_TRUE_ANYHOW: dict[str, Any] = {"combine": "renormalized", "jitter": 0}
"""What holds of the routers that do not read the option: the weights of hash and soft add up to 1."""


@dataclass(frozen=True)
class MoESpec:
    """How tokens find experts.

    Args:
        experts: E.
        router: "top_k": each token takes the k most probable experts (Shazeer et al. 2017; with k = 1 Fedus et al.
            2022, "Switch Transformers"). "noisy_top_k": the same of noisy logits. "expert_choice": each expert takes
            the tokens most probably its own (Zhou et al. 2022). "soft": experts read and write mixtures of tokens
            (Puigcerver et al. 2024). "hash": a fixed table from token ids to experts (Roller et al. 2021).
        k: experts a token; of expert_choice their mean number (Zhou et al. call it the capacity factor); soft has none.
        combine: what the chosen experts' outputs are weighted by, p being the router's softmax over all experts. "raw":
            p (Switch, V-MoE). "renormalized": p over the sum of the chosen (GShard). "straight_through": the value of
            renormalized and a gradient as of log p (ours): with identical experts the layer is one expert, exactly, as
            with renormalized, whose router then has no gradient (never, for k = 1); here it has.
        capacity_factor: an expert takes at most ceil(L k capacity_factor / E) of a sample's L real tokens, and choices
            beyond that are dropped; None: nothing is dropped. expert_choice takes None as 1.
        balance: against experts that starve. "loss": Fedus et al. 2022, equations 4 to 6. "bias": a number an expert,
            added to p for choosing only, and moved by `update_biases` (Wang et al. 2024, "Auxiliary-Loss-Free Load
            Balancing"). "none". The routers expert_choice, soft and hash have nothing to balance.
        balance_weight: of the balance loss; read with ``balance: loss`` by top_k and noisy_top_k, and elsewhere let be,
            so that routers can be compared under one setting. So are z_weight and init_std.
        bias_rate: u, by which a step moves the bias.
        z_weight: of the router z-loss (Zoph et al. 2022, "ST-MoE", equation 5); 0 for none. hash and soft have none.
        jitter: in training the router reads x times U(1 - jitter, 1 + jitter) (Fedus et al. 2022); experts read x.
        init_std: standard deviation of the router's first weights (hash has none). Not 0: equal logits send all tokens
            to expert 0.
        router_dtype: "float32", under autocast too; "model": whatever autocast or the weights have, which is there to
            show what float32 is for.
        noise: of noisy_top_k: "learned" (Shazeer et al. 2017, equation 4) or "fixed", standard deviation 1 / E
            (Riquelme et al. 2021, "V-MoE").
        hash: "random", or "balanced": ids in the order of their frequency, each to the emptiest expert.
        hash_seed: of the table. The same seed gives the same table, whatever else is drawn.
        dispatch: how the products are computed; all give the same. "auto": the fastest the device has. "sort": tokens
            sorted by expert, one product an expert. "grouped": the same by torch's grouped product. "batched": experts
            padded to equal length, one batched product. "loop": one expert after another, straight from the definition.
        slots: of soft, an expert.

    Raises:
        WlsupError: a value out of its range, options that exclude one another, or one that the router does not read.
    """

    experts: int = 8
    router: RouterName = "top_k"
    k: int = 1
    combine: Combine = "straight_through"
    capacity_factor: float | None = None
    balance: Literal["loss", "bias", "none"] = "loss"
    balance_weight: float = 1e-2
    bias_rate: float = 1e-3
    z_weight: float = 1e-3
    jitter: float = 1e-2
    init_std: float = 0.02
    router_dtype: Literal["float32", "model"] = "float32"
    noise: Literal["learned", "fixed"] = "learned"
    hash: Literal["random", "balanced"] = "random"
    hash_seed: int = 0
    dispatch: Dispatch = "auto"
    slots: int = 1

    def __post_init__(self) -> None:
        choose("moe.router", self.router, get_args(RouterName))
        choose("moe.combine", self.combine, get_args(Combine))
        choose("moe.balance", self.balance, ("loss", "bias", "none"))
        choose("moe.router_dtype", self.router_dtype, ("float32", "model"))
        choose("moe.noise", self.noise, ("learned", "fixed"))
        choose("moe.hash", self.hash, ("random", "balanced"))
        choose("moe.dispatch", self.dispatch, get_args(Dispatch))
        if self.experts < 1 or not 1 <= self.k <= self.experts or self.slots < 1:
            raise WlsupError(
                f"moe needs experts >= 1, k between 1 and experts, and slots >= 1, not {self.experts}, {self.k} and "
                f"{self.slots}."
            )
        if min(self.balance_weight, self.bias_rate, self.z_weight) < 0 or not 0 <= self.jitter < 1:
            raise WlsupError(
                "moe needs balance_weight, bias_rate and z_weight >= 0 and jitter in [0, 1), not "
                f"{self.balance_weight}, {self.bias_rate}, {self.z_weight} and {self.jitter}."
            )
        if not self.init_std > 0:
            raise WlsupError(
                f"moe.init_std must be above 0, not {self.init_std}: with equal logits every token goes to expert 0. "
                "Leave it at 0.02."
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise WlsupError(f"moe.capacity_factor must be above 0, or null for none, not {self.capacity_factor}.")
        if self.router == "soft" and (self.capacity_factor is not None or self.k > 1):
            raise WlsupError(
                "moe.router: soft drops no token and chooses none; set moe.slots, not capacity_factor or k."
            )
        if self.balance == "bias" and not self.learned:
            raise WlsupError(
                f"moe.balance: bias is for the routers top_k and noisy_top_k; {self.router} has nothing to balance. "
                "Leave moe.balance out."
            )
        for option, routers in _READ_BY.items():
            given = getattr(self, option)
            if self.router not in routers and given not in (getattr(MoESpec, option), _TRUE_ANYHOW.get(option)):
                raise WlsupError(
                    f"moe.{option}: {given} is for moe.router: {' or '.join(routers)}, and {self.router} does not read "
                    f"it: leave moe.{option} out."
                )
        if self.bias_rate != MoESpec.bias_rate and self.balance != "bias":
            raise WlsupError("moe.bias_rate is of moe.balance: bias: set that, or leave moe.bias_rate out.")

    @property
    def learned(self) -> bool:
        """Whether tokens choose by learned logits: what balancing is for."""
        return self.router in ("top_k", "noisy_top_k")

    def check_causal(self) -> None:
        """Refuse a router by which later tokens change what earlier ones get.

        Raises:
            WlsupError: saying why.
        """
        if why := _WHY_NOT_CAUSAL.get(self.router):
            raise WlsupError(
                f"moe.router: {self.router} is not causal: {why}. In a causal language model the next word would leak "
                "into the prediction, and generation would compute another function. Use top_k, noisy_top_k or hash."
            )
