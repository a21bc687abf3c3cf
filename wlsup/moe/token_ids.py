"""How an MoE layer inside a language model learns which tokens pass: their ids, and which of them are padding.

Shapes: B samples, P prefix positions, T words, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wlsup.errors import WlsupError

__all__ = ["TokenIds"]


class TokenIds:
    """Where the ids of the forward pass under way lie, and MoE layers find them.

    Hash routing keys on the ids of the input tokens, which a layer in the middle of a language model does not see.
    Positions of a prefix have no id; position i of it gets ``vocabulary + i`` (ours; Roller et al. 2021 route words
    only), so that there are `rows` ids in all. In generation every step's ids are those that its input embedding is
    fed: `watch` it.

    Args:
        vocabulary: number V of the language model's token ids.
        positions: P, the prefix's length; 0 without one.
    """

    def __init__(self, vocabulary: int = 0, positions: int = 0) -> None:
        self.vocabulary, self.positions = vocabulary, positions
        self.mask: Tensor | None = None
        self._held: Tensor | None = None
        self._fed: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def rows(self) -> int:
        """Number of ids in all: what `MoE` takes as its ``vocabulary``."""
        return self.vocabulary + self.positions

    def with_prefix(self, ids: Tensor) -> Tensor:
        """(B, T) ids of the words behind the prefix -> (B, P + T)."""
        prefix = self.vocabulary + torch.arange(self.positions, device=ids.device)
        return torch.cat([prefix.expand(len(ids), -1), ids], dim=1)

    @contextmanager
    def holding(self, ids: Tensor | None, mask: Tensor | None = None) -> Iterator[None]:
        """Hold (B, L) ``ids``, and a ``mask`` that is False or 0 at padding, for a forward pass or a generation."""
        before = self._held, self._fed, self.mask
        self._held, self._fed, self.mask = ids, None, None if mask is None else mask.bool()
        try:
            yield
        finally:
            self._held, self._fed, self.mask = before

    def watch(self, embedding: nn.Module) -> None:
        """Hook a language model's input embedding, so that the ids it is fed are known; `unwatch` undoes it."""
        self._handles.append(embedding.register_forward_pre_hook(self._note))

    def unwatch(self) -> None:
        """Take every hook out."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def find(self, batch: int, length: int) -> Tensor:
        """Return the (B, L) ids of the tokens that pass.

        The last that were fed are looked at first, then those held; a pass over exactly the prefix needs neither. Beams
        of one sample share its ids.

        Raises:
            WlsupError: none of ``length`` positions are known.
        """
        for ids in (self._fed, self._held):
            if ids is not None and ids.shape[1] == length and batch % len(ids) == 0:
                return ids.repeat_interleave(batch // len(ids), dim=0)
        if self._held is None and self._fed is None and length == self.positions:
            return (self.vocabulary + torch.arange(length)).expand(batch, -1)
        known = [tuple(ids.shape) for ids in (self._fed, self._held) if ids is not None]
        raise WlsupError(
            f"The ids of {batch} x {length} tokens are asked for, and {known or 'none'} are known. Wrap the forward "
            "pass in `with token_ids.holding(ids):` with an id for each position (token_ids.with_prefix), and watch "
            "the input embedding for generation."
        )

    def find_mask(self, batch: int, length: int) -> Tensor | None:
        """Return the (B, L) mask held, or None where none of this shape is."""
        if self.mask is None or self.mask.shape[1] != length or batch % len(self.mask):
            return None
        return self.mask.repeat_interleave(batch // len(self.mask), dim=0)

    def _note(self, embedding: nn.Module, inputs: tuple) -> None:
        if inputs and inputs[0].ndim == 2:
            self._fed = inputs[0]
