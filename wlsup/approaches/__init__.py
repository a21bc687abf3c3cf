"""The approaches, one file each, and the names by which the command line knows them.

Importing this package imports no torch, so that the names can be listed, and a wrong one refused, at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from wlsup.errors import choose

if TYPE_CHECKING:
    from wlsup.approaches.base import Approach

__all__ = ["APPROACHES", "approach_class"]

APPROACHES: dict[str, str] = {
    "mae_lm": "wlsup.approaches.mae_lm:MaeLM",
    "mae_cl": "wlsup.approaches.mae_cl:MaeCL",
    "bottleneck": "wlsup.approaches.bottleneck:BottleneckApproach",
    "film": "wlsup.approaches.film:FilmApproach",
    "token_replay": "wlsup.approaches.token_replay:TokenReplayApproach",
    "merged_attention": "wlsup.approaches.merged_attention:MergedAttentionApproach",
    "co_attention": "wlsup.approaches.co_attention:CoAttentionApproach",
    "asymmetric_attention": "wlsup.approaches.asymmetric_attention:AsymmetricAttentionApproach",
    "linear_map": "wlsup.approaches.linear_map:LinearMap",
    "reprogramming": "wlsup.approaches.reprogramming:ReprogrammingApproach",
    "cross_modal_reprogramming": "wlsup.approaches.cross_modal_reprogramming:CrossModalReprogramming",
    "lst": "wlsup.approaches.lst:LadderSideTuning",
    "selective_k": "wlsup.approaches.selective_k:SelectiveK",
    "magma": "wlsup.approaches.magma:Magma",
    "magma_moe": "wlsup.approaches.magma_moe:MagmaMoE",
    "full": "wlsup.approaches.full:Full",
    "lit": "wlsup.approaches.lit:Lit",
    "lora": "wlsup.approaches.lora:Lora",
}


def approach_class(name: str) -> type[Approach]:
    """Return the class behind an approach's name.

    Raises:
        WlsupError: unknown name; the message lists the valid ones.
    """
    choose("approach", name, APPROACHES, hint="`wlsup approaches` says what each one is.")
    module, _, attribute = APPROACHES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
