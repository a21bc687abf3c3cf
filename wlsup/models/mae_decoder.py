"""The masked autoencoder's decoder, and the fixed sine-cosine positions.

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (FAIR's ``models_mae.py``).
Shapes: B samples, N patches, K of them kept, P prefix tokens, D encoder width, W decoder width, p the patch size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from wlsup.errors import WlsupError

__all__ = ["DecoderSpec", "MAEDecoder", "sincos_position_embedding"]


@dataclass(frozen=True)
class DecoderSpec:
    """Which MAE decoder to put on the encoder.

    Args:
        width: W, a multiple of ``heads`` and of 4.
        depth: number of transformer blocks.
        heads: attention heads. A FAIR checkpoint does not say this number: it is taken from here.
        mlp_ratio: hidden width of the blocks' MLPs over W.
        normalize_pixels: whether targets are normalised patch by patch (FAIR's ``--norm_pix_loss``).
        pretrained: use the checkpoint's decoder, and its width and depth in place of these, where it has one; False
            always begins with a fresh decoder of this shape.
        warmup_batches: of a fresh decoder on a pretrained encoder: for so many training batches its loss teaches the
            decoder alone, and gives the encoder no gradient while the decoder knows nothing.
    """

    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    normalize_pixels: bool = True
    pretrained: bool = True
    warmup_batches: int = 0

    def __post_init__(self) -> None:
        if self.warmup_batches < 0:
            raise WlsupError(f"decoder.warmup_batches must be 0 or more, not {self.warmup_batches}.")


def sincos_position_embedding(width: int, grid: tuple[int, int], num_prefix_tokens: int = 1) -> Tensor:
    """Return FAIR's fixed sine-cosine positions: the first half of the channels encodes the column, the second the row.

    Source: He et al. 2022; ``util/pos_embed.py``, after Vaswani et al. 2017, section 3.5.

    Args:
        width: W, a multiple of 4.
        grid: rows and columns of patches.
        num_prefix_tokens: P rows of zeros put in front.

    Returns:
        (1, P + rows * columns, W) fp32.

    Raises:
        WlsupError: a width that is not a multiple of 4.
    """
    if width % 4:
        raise WlsupError(f"Sine-cosine positions need a width that is a multiple of 4; got {width}.")
    rows, columns = grid
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)[:, None] * frequency
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)[:, None] * frequency
    patches = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    prefix = torch.zeros(num_prefix_tokens, width, dtype=torch.float64)
    return torch.cat([prefix, patches]).float().unsqueeze(0)


class MAEDecoder(nn.Module):
    """The light transformer that predicts pixels from the kept patches' latents and mask tokens.

    Its keys are FAIR's without ``decoder_``. `pos_embed` is a parameter that does not require a gradient, as in FAIR's
    code: it is part of the published parameter counts and of every checkpoint, and is never trained.

    Args:
        embed_dim: D, the encoder's width.
        patch_size: p, in pixels.
        grid_size: rows and columns of patches that `pos_embed` is made for.
        spec: its shape.
        num_prefix_tokens: P.
        in_chans: channels of a picture.
        norm_eps: epsilon of the layer norms.

    Raises:
        WlsupError: a width that is not a multiple of the heads.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int,
        grid_size: tuple[int, int],
        spec: DecoderSpec,
        num_prefix_tokens: int = 1,
        in_chans: int = 3,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if spec.width % spec.heads or spec.depth < 1:
            raise WlsupError(
                f"A decoder of width {spec.width}, {spec.heads} heads and depth {spec.depth} cannot be: the width must "
                "be a multiple of the heads, and the depth at least 1."
            )
        self.grid_size = grid_size
        self.num_prefix_tokens = num_prefix_tokens
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.embed = nn.Linear(embed_dim, spec.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        positions = sincos_position_embedding(spec.width, grid_size, num_prefix_tokens)
        self.pos_embed = nn.Parameter(positions.to(self.embed.weight.device), requires_grad=False)
        self.blocks = nn.Sequential(
            *(
                Block(spec.width, spec.heads, mlp_ratio=spec.mlp_ratio, qkv_bias=True, norm_layer=norm)
                for _ in range(spec.depth)
            )
        )
        self.norm = norm(spec.width)
        self.pred = nn.Linear(spec.width, patch_size * patch_size * in_chans)

    def forward(
        self,
        tokens: Tensor,
        ids_keep: Tensor,
        num_patches: int,
        grid: tuple[int, int] | None = None,
        ids_predict: Tensor | None = None,
    ) -> Tensor:
        """Predict the pixels of all patches, or of some.

        Args:
            tokens: (B, P + K, D), the encoder's tokens, kept patches in the order of ``ids_keep``.
            ids_keep: (B, K).
            num_patches: N.
            grid: rows and columns when they are not those the decoder was made for.
            ids_predict: (B, R) patches to predict; None: all. The same numbers for less: in the last block only these
                patches ask (all are still looked at), and only these pass its MLP and the prediction.

        Returns:
            (B, N, p * p * C), or (B, R, p * p * C) in the order of ``ids_predict``.
        """
        tokens, prefix = self.embed(tokens), self.num_prefix_tokens
        batch, _, width = tokens.shape
        patches = self.mask_token.to(tokens.dtype).expand(batch, num_patches, width)
        patches = patches.scatter(1, ids_keep[..., None].expand(-1, -1, width), tokens[:, prefix:])
        tokens = torch.cat([tokens[:, :prefix], patches], dim=1) + self._positions(grid)
        if ids_predict is None:
            return self.pred(self.norm(self.blocks(tokens))[:, prefix:])
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        rows = ids_predict + prefix
        tokens = _block_for(last, tokens, rows) if _is_plain(last) else _take(last(tokens), rows)
        return self.pred(self.norm(tokens))

    def _positions(self, grid: tuple[int, int] | None) -> Tensor:
        if grid is None or grid == self.grid_size:
            return self.pos_embed
        return resample_abs_pos_embed(
            self.pos_embed,
            new_size=list(grid),
            old_size=list(self.grid_size),
            num_prefix_tokens=self.num_prefix_tokens,
        )


def _take(tokens: Tensor, rows: Tensor) -> Tensor:
    """(B, T, W), (B, R) -> (B, R, W)."""
    batch, length, width = tokens.shape
    offsets = torch.arange(batch, device=rows.device)[:, None] * length
    return tokens.reshape(-1, width).index_select(0, (rows + offsets).flatten()).view(batch, -1, width)


def _is_plain(block: Block) -> bool:
    """Whether a block is as timm made it: nothing replaced inside and nobody's hooks on it."""
    as_made = type(block) is Block and type(block.attn) is Attention and type(block.attn.qkv) is nn.Linear
    return as_made and not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())


def _block_for(block: Block, tokens: Tensor, rows: Tensor) -> Tensor:
    """Run a pre-norm block for the queries in ``rows`` only: (B, T, W), (B, R) -> (B, R, W)."""
    attention, normed = block.attn, block.norm1(tokens)
    (batch, length, width), heads = tokens.shape, block.attn.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = F.linear(_take(normed, rows), weight[:width], bias[:width])
    query = query.view(batch, -1, heads, width // heads).transpose(1, 2)
    key, value = F.linear(normed, weight[width:], bias[width:]).view(batch, length, 2, heads, -1).unbind(2)
    attended = F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2))
    tokens = _take(tokens, rows) + attention.proj(attended.transpose(1, 2).reshape(batch, -1, width))
    return tokens + block.mlp(block.norm2(tokens))
