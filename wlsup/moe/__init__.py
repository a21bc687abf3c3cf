"""Mixtures of experts, usable on their own: ``from wlsup.moe import MoE, MoESpec, MLPExpert``."""

from wlsup.moe.experts import MLPExpert
from wlsup.moe.hashing import token_frequencies
from wlsup.moe.layer import MoE, Routing, auxiliary_losses, update_biases
from wlsup.moe.losses import balance_loss, router_z_loss
from wlsup.moe.spec import MoESpec
from wlsup.moe.token_ids import TokenIds

__all__ = [
    "MLPExpert",
    "MoE",
    "MoESpec",
    "Routing",
    "TokenIds",
    "auxiliary_losses",
    "balance_loss",
    "router_z_loss",
    "token_frequencies",
    "update_biases",
]
