"""Token ids and padding for MoE layers in a language model that reads pictures: nobody has to hand them in.

Shapes: B samples, P prefix positions, T words, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wlsup.moe.sites import blocks_of
from wlsup.moe.token_ids import TokenIds

__all__ = ["PrefixTokenIds"]


class PrefixTokenIds(TokenIds):
    """A `TokenIds` that finds ids and mask of every pass by itself, from what the language model is given.

    A pass over embeddings is P prefix positions and then the words that were embedded since the pass before; a pass
    over ids, as every step of generation after the first is, says them. The padding is what the model's own
    ``attention_mask`` leaves out. `watch` the input embedding as well. Within `holding` only what is held counts.

    Args:
        vocabulary: see `TokenIds`.
        positions: see `TokenIds`.
    """

    def __init__(self, vocabulary: int = 0, positions: int = 0) -> None:
        super().__init__(vocabulary, positions)
        self._told = False
        self._following: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def following(self) -> bool:
        """Whether it is hooked into a language model."""
        return bool(self._following)

    def follow(self, model: nn.Module) -> None:
        """Hook transformers' language model; `unfollow` undoes it, and `unwatch` does not."""
        # The one that holds the blocks: in generation OPT's decoder is called without its ``base_model``.
        path, _ = blocks_of(model)
        body = model.get_submodule(path.rpartition(".")[0])
        self._following.append(body.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._following.append(body.register_forward_hook(self._end))

    def unfollow(self) -> None:
        """Take the hooks of `follow` out."""
        for handle in self._following:
            handle.remove()
        self._following.clear()

    @contextmanager
    def holding(self, ids: Tensor | None, mask: Tensor | None = None) -> Iterator[None]:
        """As `TokenIds.holding`."""
        before, self._told = self._told, True
        try:
            with super().holding(ids, mask):
                yield
        finally:
            self._told = before

    # Methods, so that a deep copy of a model together with its layers is driven by the copied ones.
    def _begin(self, body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._told:
            return
        embeddings, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if embeddings is None:
            self._held = args[0] if args else kwargs["input_ids"]
            length = self._held.shape[1]
        else:
            length = embeddings.shape[1]
            self._held = self._behind_prefix(len(embeddings), length - self.positions, embeddings.device)
        self._fed = None
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length
        self.mask = mask[:, -length:].bool() if padded else None

    def _end(self, body: nn.Module, args: tuple, output: Any) -> None:
        if not self._told:
            self._fed = None  # or the next picture, as long as these words, would be taken for them

    def _behind_prefix(self, batch: int, words: int, device: torch.device) -> Tensor | None:
        """Return (B, P + T) ids where they are known."""
        if words == 0:
            return self.with_prefix(torch.empty(batch, 0, dtype=torch.int64, device=device))
        if self._fed is not None and self._fed.shape[1] == words and batch % len(self._fed) == 0:
            return self.with_prefix(self._fed.repeat_interleave(batch // len(self._fed), 0))  # as beams do
        return None
