"""What of a trained approach is a plain encoder: its own weights, or an adapter's folded into them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from wlsup.adapters.base import Adapter
from wlsup.models.vision import VisionEncoder
from wlsup.objectives.regularizers import without_adapters

if TYPE_CHECKING:
    from wlsup.approaches.base import Approach

__all__ = ["encoder_adapters", "plain_encoder"]


def encoder_adapters(approach: Approach) -> list[Adapter]:
    """Return the adapters that change the encoder by hooks; those of a language model are not among them."""
    hooks = {id(hook) for module in approach.encoder.modules() for hook in module._forward_hooks.values()}
    return [
        module
        for module in approach.modules()
        if isinstance(module, Adapter) and any(id(hook) in hooks for hook in _hooks_of(module))
    ]


def plain_encoder(approach: Approach) -> VisionEncoder | None:
    """Return a copy without hooks that computes the approach's features, under the null condition, by weights alone.

    Returns:
        The copy, in eval mode; None where an adapter cannot be folded into the encoder's weights.
    """
    if hasattr(approach, "merged"):
        return approach.merged()
    adapters = encoder_adapters(approach)
    if not adapters:
        return copy.deepcopy(approach.encoder).requires_grad_(False).eval()
    plain = without_adapters(approach.encoder)
    return plain if all(adapter.fold(plain) for adapter in adapters) else None


def _hooks_of(adapter: Adapter) -> list:
    found = []
    for handle in adapter._handles:
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:
            found.append(hooks[handle.id])
    return found
