"""The image prefix: what a vision encoder saw, as input embeddings of a language model.

Shapes: B samples, N patches, D channels of the encoder, W channels of the language model, P prefix positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.batch import VisionOutput
from wlsup.draws import per_sample
from wlsup.errors import WlsupError, choose

__all__ = ["ImagePrefix", "PrefixSpec"]


@dataclass(frozen=True)
class PrefixSpec:
    """Which picture tokens the language model gets, and how they are mapped.

    Args:
        tokens: "patches", one position a patch without class token and registers (MAGMA, LiMBeR); or "pooled", the
            encoder's pooled feature.
        length: positions made from the pooled feature.
        pool: patches are first averaged over squares of ``pool`` x ``pool``: a quarter of the positions for 2.
        dropout: after the linear map, in [0, 1).
        layer_norm: normalise after the dropout: MAGMA does, LiMBeR does not (its map is linear).

    Raises:
        WlsupError: a value out of its range, or one that does not belong to the kind of tokens.
    """

    tokens: Literal["patches", "pooled"] = "patches"
    length: int = 1
    pool: int = 1
    dropout: float = 0.1
    layer_norm: bool = True

    def __post_init__(self) -> None:
        choose("prefix tokens", self.tokens, ("patches", "pooled"))
        if self.length < 1 or self.pool < 1 or not 0 <= self.dropout < 1:
            raise WlsupError(
                f"prefix needs length >= 1, pool >= 1 and dropout in [0, 1), not {self.length}, {self.pool} and "
                f"{self.dropout}."
            )
        if self.length > 1 and self.tokens == "patches":
            raise WlsupError("prefix.length is of the pooled feature; patches have a position each. Set prefix.pool.")
        if self.pool > 1 and self.tokens == "pooled":
            raise WlsupError("prefix.pool averages patches; with prefix.tokens: pooled set prefix.length.")


class _Dropout(nn.Dropout):
    """Dropout whose draws do not depend on over how many processes the batch is spread."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or not self.p:
            return x
        share = 1 - self.p

        def draw(count: int, generator: torch.Generator | None) -> Tensor:
            kept = torch.empty(count, *x.shape[1:], dtype=torch.bool, device=x.device)
            return kept.bernoulli_(share, generator=generator)

        return (x * per_sample(draw, len(x), x.device)).mul(1 / share)


class ImagePrefix(nn.Module):
    """Linear map, dropout and, in MAGMA's form, LayerNorm.

    Source: Eichenberg et al. 2022 (MAGMA), section 3.1; without the LayerNorm, Merullo et al. 2023 (LiMBeR), section 3.
    The linear map has D * W + W parameters (D * length * W + length * W from a pooled feature).

    Args:
        image_width: D.
        language_width: W.
        spec: which tokens, and what follows the map.
    """

    def __init__(self, image_width: int, language_width: int, spec: PrefixSpec) -> None:
        super().__init__()
        self.spec = spec
        self.project = nn.Linear(image_width, language_width * spec.length)
        self.dropout = _Dropout(spec.dropout)
        self.norm = nn.LayerNorm(language_width) if spec.layer_norm else None

    def positions(self, grid: tuple[int, int]) -> int:
        """Return P for a grid of (rows, columns) patches.

        Raises:
            WlsupError: the grid does not divide into squares of ``pool``.
        """
        if self.spec.tokens == "pooled":
            return self.spec.length
        rows, columns = grid
        if rows % self.spec.pool or columns % self.spec.pool:
            raise WlsupError(
                f"prefix.pool={self.spec.pool} does not divide a grid of {rows} x {columns} patches. Give a divisor."
            )
        return rows * columns // self.spec.pool**2

    def forward(self, vision: VisionOutput, grid: tuple[int, int], ids_keep: Tensor | None = None) -> Tensor:
        """Return the prefix.

        Args:
            vision: the encoder's output.
            grid: (rows, columns) of the whole picture's patches.
            ids_keep: (B, K) which patches the output holds, where it is of a masked picture; they are put in order, row
                by row, since positions mean something to a language model.

        Returns:
            (B, P, W).

        Raises:
            WlsupError: patches of a masked picture cannot be averaged over squares, nor those of a grid that does not
                divide into such; or they are not of this grid.
        """
        tokens = self.select(vision, grid, ids_keep)
        mapped = self.dropout(self.project(tokens).unflatten(-1, (self.spec.length, -1)).flatten(1, 2))
        return mapped if self.norm is None else self.norm(mapped)

    def select(self, vision: VisionOutput, grid: tuple[int, int], ids_keep: Tensor | None = None) -> Tensor:
        """Return what the map reads, (B, P, D), or (B, 1, D) from the pooled feature; arguments as `forward`."""
        if self.spec.tokens == "pooled":
            return vision.pooled[:, None]
        patches = vision.patch_tokens
        if ids_keep is not None:
            if self.spec.pool > 1:
                raise WlsupError("prefix.pool needs whole pictures; a masked one has holes. Set prefix.pool to 1.")
            return torch.take_along_dim(patches, ids_keep.argsort(dim=1)[..., None], dim=1)
        if patches.shape[1] not in (grid[0] * grid[1], self.positions(grid)):
            raise WlsupError(f"{patches.shape[1]} patches are not a grid of {grid[0]} x {grid[1]}, nor averages of it.")
        if patches.shape[1] == self.positions(grid):  # pool is 1, or `reduced` has averaged them
            return patches
        cells = patches.transpose(1, 2).unflatten(2, grid)
        return F.avg_pool2d(cells, self.spec.pool).flatten(2).transpose(1, 2)

    def reduced(self, vision: VisionOutput, grid: tuple[int, int]) -> VisionOutput:
        """Return the encoder's output with no more tokens than the map reads: what is worth keeping of a picture.

        `forward` makes the same of it.

        Args:
            vision: the encoder's output for whole pictures.
            grid: (rows, columns) of their patches.

        Returns:
            Tokens (B, P, D), or (B, 0, D) where the map reads the pooled feature; none of them a prefix token.
        """
        if self.spec.tokens == "pooled":
            return VisionOutput(vision.pooled, vision.tokens[:, :0], 0)
        return VisionOutput(vision.pooled, self.select(vision, grid), 0)
