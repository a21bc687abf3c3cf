"""The arithmetic of the contrastive losses on one rank's rows of the logits, tile by tile.

Shapes: b pairs on this rank, B on all ranks, D channels. The logits are b x B; one tile of them exists at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wlsup.objectives.distributed import Ranks

__all__ = ["Needs", "Strip", "StripResult", "info_nce_strip", "siglip_strip"]

# Logits within +-40 can be exponentiated as they are: in fp32 neither do the sums overflow nor do an exponential or the
# inverse of a normaliser underflow. It saves one of two exponentials a logit, in both passes.
_PLAIN_EXP_LIMIT = 40.0
# Beyond 40 softplus(x) is x to the last digit, of fp64 too.
_SOFTPLUS_IS_LINEAR = 40.0


class Needs(NamedTuple):
    """Which gradients are asked for. ``text`` is the wish of any rank: each adds to the texts of all."""

    image: bool
    text: bool
    scale: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether there is anything to compute beyond the loss."""
        return self.image or self.text or self.scale or self.bias


class StripResult(NamedTuple):
    """A strip's part of a loss that is *summed*, not averaged, over pairs, and of its gradients.

    ``d_image`` (b, D) or None, ``d_text`` (B, D) or None, ``d_bias`` scalar or None. One of the first two is there even
    where only the scale's gradient is asked for, which follows from either.
    """

    loss: Tensor
    d_image: Tensor | None
    d_text: Tensor | None
    d_bias: Tensor | None


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    logits: Tensor
    own: Tensor  # the view of the logits that are the positives'
    own_rows: slice


@dataclass
class Strip:
    """The rows of the logits that are this rank's: s_ij = scale <image_i, text_j> + bias.

    Args:
        image: (b, D) this rank's images.
        text: (B, D) all texts.
        scale: factor of the cosines.
        bias: added to the logits.
        keys: (b,) and (B,) int64 ids of the rows' and columns' images, or None. Two pairs of one id get
            a logit of -inf.
        offset: column of the first row's own text.
        tile: side of a tile.
    """

    image: Tensor
    text: Tensor
    scale: float
    bias: float
    keys: tuple[Tensor, Tensor] | None
    offset: int
    tile: int

    def __post_init__(self) -> None:
        self.scaled = self.image * self.scale

    def tiles(self) -> Iterator[_Tile]:
        """Yield the tiles, row by row. Their logits may be overwritten: the next tile lies in the same memory."""
        b, B = self.image.shape[0], self.text.shape[0]
        buffer = self.image.new_empty(min(self.tile, b) * min(self.tile, B))
        for top in range(0, b, self.tile):
            for left in range(0, B, self.tile):
                rows, columns = slice(top, min(top + self.tile, b)), slice(left, min(left + self.tile, B))
                height, width = rows.stop - top, columns.stop - left
                logits = buffer[: height * width].view(height, width)
                torch.mm(self.scaled[rows], self.text[columns].t(), out=logits)
                if self.bias:
                    logits.add_(self.bias)
                # Row i is positive in column i + offset, which may lie in this tile for some of its rows, or for none.
                first = max(top, left - self.offset)
                last = max(first, min(rows.stop, columns.stop - self.offset))
                column = first + self.offset - left
                own = logits[first - top : last - top, column : column + last - first].diagonal()
                if self.keys is not None:
                    kept = own.clone()
                    logits.masked_fill_(self.keys[0][rows, None] == self.keys[1][columns], -math.inf)
                    own.copy_(kept)
                yield _Tile(rows, columns, logits, own, slice(first, last))

    def logits_are_small(self) -> bool:
        """Whether no logit can leave +-40, by the Cauchy-Schwarz inequality."""
        if not self.image.shape[0]:
            return True
        longest = [float(torch.linalg.vector_norm(x, dim=1).amax()) for x in (self.image, self.text)]
        return self.scale * longest[0] * longest[1] <= _PLAIN_EXP_LIMIT

    def zeros(self, need: Needs) -> tuple[Tensor | None, Tensor | None]:
        """Return what the gradients of image and text are accumulated in."""
        d_image = torch.zeros_like(self.image) if need.image or (need.scale and not need.text) else None
        return d_image, torch.zeros_like(self.text) if need.text else None

    def accumulate(self, tile: _Tile, weights: Tensor, d_image: Tensor | None, d_text: Tensor | None) -> None:
        """Add one tile's part, ``weights`` being the derivative by its logits. ``d_image`` still lacks ``scale``."""
        if d_image is not None:
            d_image[tile.rows].addmm_(weights, self.text[tile.columns])
        if d_text is not None:
            d_text[tile.columns].addmm_(weights.t(), self.scaled[tile.rows])


def info_nce_strip(strip: Strip, ranks: Ranks, need: Needs) -> StripResult:
    """Return sum_i [logsumexp_j s_ij + logsumexp_j s_ji - 2 s_ii] over this rank's i, and gradients.

    The first pass over the tiles finds the normalisers of rows and columns, the second recomputes the tiles for the
    gradients: G_ij = exp(s_ij - row_i) + exp(s_ij - column_j) - 2 [i = j]. Negatives are summed without the positive.
    With n_i = logsumexp_{j != i} s_ij, a row's loss is softplus(n_i - s_ii), and its part of G_ii -sigmoid(n_i - s_ii):
    late in training, where the positive's probability rounds to 1, the difference from 1 would be rounding error only.
    """
    b, B = strip.image.shape[0], strip.text.shape[0]
    plain = strip.logits_are_small()
    row = strip.image.new_full((b,), 0.0 if plain else -math.inf)
    column = strip.image.new_full((B,), 0.0 if plain else -math.inf)
    own = strip.image.new_empty(b)
    for tile in strip.tiles():
        own[tile.own_rows] = tile.own
        tile.own.fill_(-math.inf)
        r, c = row[tile.rows], column[tile.columns]
        if plain:
            exponentials = tile.logits.exp_()
            r += exponentials.sum(1)
            c += exponentials.sum(0)
        else:
            torch.logaddexp(r, tile.logits.logsumexp(1), out=r)
            torch.logaddexp(c, tile.logits.logsumexp(0), out=c)
    if plain:
        row.log_()
        column.log_()
    own_column = ranks.logsumexp(column)[strip.offset : strip.offset + b]
    missed = torch.stack([row - own, own_column - own])
    loss = F.softplus(missed, threshold=_SOFTPLUS_IS_LINEAR).sum()
    if not need.any:
        return StripResult(loss, None, None, None)

    torch.logaddexp(row, own, out=row)
    column = ranks.gather(torch.logaddexp(own_column, own))
    own_weights = -missed.sigmoid_().sum(0)
    d_image, d_text = strip.zeros(need)
    spare = strip.image.new_empty(min(strip.tile, b) * min(strip.tile, B))
    row_inverse, column_inverse = (row.neg().exp_(), column.neg().exp_()) if plain else (row, column)
    for tile in strip.tiles():
        other = spare[: tile.logits.numel()].view_as(tile.logits)
        if plain:
            torch.add(row_inverse[tile.rows, None], column_inverse[tile.columns], out=other)
            weights = tile.logits.exp_().mul_(other)
        else:
            torch.sub(tile.logits, row[tile.rows, None], out=other).exp_()
            weights = tile.logits.sub_(column[tile.columns]).exp_().add_(other)
        tile.own.copy_(own_weights[tile.own_rows])
        strip.accumulate(tile, weights, d_image, d_text)
    return StripResult(loss, d_image, d_text, None)


def siglip_strip(strip: Strip, ranks: Ranks, need: Needs) -> StripResult:
    """Return -sum_ij log sigmoid(z_ij s_ij) over this rank's i and all j, z_ii = 1, else -1, and gradients.

    No normaliser ties the logits together, so one pass gives both: G_ij = sigmoid(s_ij) - [i = j].
    """
    loss = strip.image.new_zeros(())
    d_image, d_text = strip.zeros(need)
    d_bias = strip.image.new_zeros(()) if need.bias else None
    for tile in strip.tiles():
        # With x = -z s each term is softplus(x) and its derivative sigmoid(x): no difference of nearly equal numbers.
        tile.own.neg_()
        loss += F.softplus(tile.logits, threshold=_SOFTPLUS_IS_LINEAR).sum()
        if not need.any:
            continue
        weights = tile.logits.sigmoid_()
        tile.own.neg_()
        if d_bias is not None:
            d_bias += weights.sum()
        strip.accumulate(tile, weights, d_image, d_text)
    return StripResult(loss, d_image, d_text, d_bias)
