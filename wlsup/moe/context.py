"""What an MoE layer inside a language model must know and its input does not say: samples and padding.

Shapes: B samples, L positions, T = B * L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wlsup.moe.sites import Site

__all__ = ["SequenceContext"]


class SequenceContext:
    """Give the MoE layers of a language model the padding mask, and OPT's their tokens as samples, by hooks.

    Padding must take no part in losses and capacity, and what fills up in the order of positions must know where a
    sample begins; a transformer block hands its MLP neither. OPT even flattens the tokens to (T, D) before its MLP.
    The ``attention_mask`` that the stack of blocks is called with says what is padding; while generating, its last
    columns do.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.shape: tuple[int, ...] | None = None
        self.unflattened = False

    def attach(self, stack: nn.Module, sites: Sequence[Site], layers: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Hook it in.

        Args:
            stack: the module that holds the list of blocks.
            sites: where the layers are.
            layers: one a site.

        Returns:
            What removes the hooks.
        """
        handles = [stack.register_forward_pre_hook(self._note_mask, with_kwargs=True)]
        for site, layer in zip(sites, layers, strict=True):
            if site.loose:
                handles.append(site.block.register_forward_pre_hook(self._note_shape, with_kwargs=True))
                handles.append(layer.register_forward_hook(self._flatten))
            handles.append(layer.register_forward_pre_hook(self._give, with_kwargs=True))
        return handles

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        """Take the hooks of any such context out of a module, its own handles being gone (after a copy or a load)."""
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), cls)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)

    def _note_mask(self, stack: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _note_shape(self, block: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        self.shape = tuple((inputs[0] if inputs else named["hidden_states"]).shape)

    def _give(self, layer: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x, *others = inputs
        # The shape serves once: the layer may also be called on its own, with any (T, D).
        shape, self.shape, self.unflattened = self.shape, None, False
        if shape is not None and x.ndim == 2:
            x, self.unflattened = x.reshape(shape), True
        mask = self.mask
        if mask is not None and x.ndim == 3 and len(mask) == len(x) and mask.shape[1] >= x.shape[1]:
            named = {"mask": mask[:, -x.shape[1] :], **named}
        return (x, *others), named

    def _flatten(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output.reshape(-1, output.shape[-1]) if self.unflattened else output
