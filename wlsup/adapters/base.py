"""What every adapter is: attached by hooks, an identity at step 0, with a learned null condition.

The contract (one parametrised test holds it for every registered adapter):

* attaching changes no key and no tensor of the pretrained model, and `Adapter.detach` gives it back bit for bit;
* at step 0 the adapted encoder computes the pretrained function, and yet the first gradient is not zero;
* a conditioned adapter answers the null condition (no caption) by a *learned* embedding through the same path that
  captions take. Evaluation sets have no captions: under null is how k-NN, export and deployment run the encoder. A hard
  identity there would make the evaluated encoder the pretrained one, whatever was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from wlsup.batch import Condition, ConditionSlot
from wlsup.errors import WlsupError

__all__ = ["ADAPTERS", "Adapter", "ConditionEmbedding", "register", "top_blocks"]

ADAPTERS: dict[str, type[Adapter]] = {}


def register(name: str) -> Callable[[type[Adapter]], type[Adapter]]:
    """Enter an adapter under ``name``, by which the contract tests find it."""

    def enter(cls: type[Adapter]) -> type[Adapter]:
        ADAPTERS[name] = cls
        cls.name = name
        return cls

    return enter


class Adapter(nn.Module):
    """A set of small modules that change an encoder's activations at chosen sites.

    Subclasses build their modules in ``__init__`` and say in `sites` where each goes.

    Args:
        width: D, channels of the encoder's tokens.
        depth: number of the encoder's blocks.
        condition_width: C, channels of the condition.
    """

    name: ClassVar[str]

    def __init__(self, width: int, depth: int, condition_width: int) -> None:
        super().__init__()
        self.width, self.depth, self.condition_width = width, depth, condition_width
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def sites(self, encoder: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor, ConditionSlot], Tensor]]]:
        """Yield (module of the encoder, function from its output (B, L, D) and the slot to the adapted output)."""
        raise TypeError(f"{type(self).__name__} does not say where it attaches: define sites().")

    def attach(self, encoder: nn.Module) -> Adapter:
        """Hook the adapter into ``encoder`` (anything with ``blocks`` and a ``condition_slot``); return the adapter.

        Raises:
            WlsupError: already attached, or the encoder's depth or width is not the one the adapter was made for.
        """
        if self._handles:
            raise WlsupError(f"This {self.name} adapter is attached already; detach() it first.")
        if len(encoder.blocks) != self.depth or encoder.embed_dim != self.width:
            raise WlsupError(
                f"This {self.name} adapter was made for {self.depth} blocks of width {self.width}; the encoder has "
                f"{len(encoder.blocks)} of width {encoder.embed_dim}."
            )
        slot: ConditionSlot = encoder.condition_slot
        for module, adapt in self.sites(encoder):
            hook = _output_hook(adapt, slot)
            self._handles.append(module.register_forward_hook(hook))
        return self

    def fold(self, encoder: nn.Module) -> bool:
        """Write what the adapter does under the null condition into an encoder's own weights, where that can be.

        Args:
            encoder: a copy of the adapted one without hooks; tensors may be shared with it, so they are replaced.

        Returns:
            Whether the copy now computes what the adapted encoder does under the null condition.
        """
        return False

    def detach(self) -> None:
        """Take every hook out: the encoder is the pretrained one again, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def top_blocks(depth: int, top: int | None) -> range:
    """Return the positions of the last ``top`` blocks of ``depth``, of all for None.

    With adapters in the last blocks only, the frozen blocks below keep no activation for the backward pass.

    Raises:
        WlsupError: ``top`` is not between 1 and ``depth``.
    """
    if top is not None and not 1 <= top <= depth:
        raise WlsupError(f"top must be between 1 and the encoder's {depth} blocks, not {top}; leave it out for all.")
    return range(0 if top is None else depth - top, depth)


def _output_hook(adapt: Callable[[Tensor, ConditionSlot], Tensor], slot: ConditionSlot) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return adapt(output, slot)

    return hook


class ConditionEmbedding(nn.Module):
    """Caption features to the vector that conditions an adapter, with a learned null.

    The pooled caption feature is layer-normalised, so that the null embedding, drawn from a unit normal, starts at the
    captions' own scale; null and captions then share every later weight.

    Args:
        condition_width: C, channels of the caption feature.
        width: channels of the embedding.
    """

    def __init__(self, condition_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(condition_width, elementwise_affine=False)
        self.null = nn.Parameter(torch.randn(condition_width))
        self.project = nn.Linear(condition_width, width)

    def forward(self, condition: Condition | None) -> Tensor:
        """Return (B, width); (1, width), to broadcast, where the whole batch runs under the null condition."""
        pooled = self.null[None]
        if condition is not None:
            pooled = torch.where(condition.present[:, None], self.norm(condition.pooled), pooled)
        return nn.functional.gelu(self.project(pooled))
