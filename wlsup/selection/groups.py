"""An encoder's parameters as ordered groups: patch embedding, blocks (or their parts), final norm and pooling."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from wlsup.errors import choose

__all__ = ["Granularity", "Group", "parameter_groups"]

Granularity = Literal["block", "sublayer", "tensor"]

_ATTENTION = ("norm1", "attn", "ls1", "gamma_1")
_FINAL = ("norm", "attn_pool", "fc_norm")


@dataclass(frozen=True)
class Group:
    """Parameters that train together or not at all.

    Args:
        name: "embed", "blocks.3", "blocks.3.attn", "norm" (with attention pooling), or a parameter's own name.
        names: its parameters, relative to the backbone.
        patterns: globs that match these and no others, as a plan wants them.
    """

    name: str
    names: tuple[str, ...]
    patterns: tuple[str, ...]


def parameter_groups(backbone: nn.Module, granularity: Granularity = "block") -> list[Group]:
    """Return the groups in the order in which a picture meets them.

    Position embeddings belong to none: they stay fixed, as in full fine-tuning.

    Args:
        backbone: a timm ViT.
        granularity: "block"; "sublayer", which splits each block into attention and MLP, each with its norm; or
            "tensor", where each parameter is a group.

    Raises:
        WlsupError: unknown granularity.
    """
    choose("granularity", granularity, ("block", "sublayer", "tensor"))
    members: dict[str, list[str]] = {}
    for name, _ in backbone.named_parameters():
        if not name.endswith("pos_embed"):
            members.setdefault(_group_of(name, granularity), []).append(name)
    groups = [Group(name, tuple(names), _patterns(names, granularity)) for name, names in members.items()]
    return sorted(groups, key=lambda group: _place(group.name))


def _group_of(name: str, granularity: Granularity) -> str:
    if granularity == "tensor":
        return name
    parts = name.split(".")
    if parts[0] == "blocks":
        block = ".".join(parts[:2])
        return block if granularity == "block" else f"{block}.{'attn' if parts[2] in _ATTENTION else 'mlp'}"
    return "norm" if parts[0] in _FINAL else "embed"


def _patterns(names: list[str], granularity: Granularity) -> tuple[str, ...]:
    if granularity == "tensor":
        return tuple(names)
    patterns: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        depth = 1 if parts[0] != "blocks" else 2 if granularity == "block" else 3
        patterns[name if len(parts) <= depth else ".".join(parts[:depth]) + ".*"] = None
    return tuple(patterns)


def _place(name: str) -> tuple[int, int]:
    block = re.match(r"blocks\.(\d+)", name)
    if block:
        return 1, int(block.group(1))
    return (2, 0) if name.split(".")[0] in _FINAL else (0, 0)
