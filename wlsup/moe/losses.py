"""What keeps a router balanced and its logits small; over the global batch, and over real tokens only.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["balance_loss", "router_z_loss"]


def balance_loss(fraction: Tensor, probability: Tensor) -> Tensor:
    """E sum_e f_e P_e: 1 where both are uniform, E where one expert has all.

    Source: Fedus et al. 2022, "Switch Transformers", equations 4 to 6 (without the weight alpha).

    Args:
        fraction: (E,) f, the share of choices that fell on each expert, before any is dropped; carries no gradient.
        probability: (E,) P, the router's mean probability of each expert.

    Returns:
        A scalar.
    """
    return fraction.numel() * (fraction.detach() * probability).sum()


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of (log sum_e exp logit_e)^2: ln(E)^2, not 0, at zero logits.

    Source: Zoph et al. 2022, "ST-MoE", equation 5.

    Args:
        logits: (T, E).
        mask: (T,) bool, True at real tokens; None: all.

    Returns:
        A scalar.
    """
    squares = logits.logsumexp(-1).square()
    if mask is None:
        return squares.mean()
    return (squares * mask).sum() / mask.sum().clamp_min(1)
