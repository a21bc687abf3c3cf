"""The vision encoder: a timm ViT with its pretrained keys unchanged, driven so that adapters can hook into it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wlsup.batch import Condition, ConditionSlot, ImageSpec, VisionOutput
from wlsup.errors import WlsupError, choose
from wlsup.models.backbones import Architecture
from wlsup.models.sources import Source, VisionSpec, open_source
from wlsup.models.weights import tensors_sha256

__all__ = ["VisionEncoder", "VisionSpec", "build_vision"]

_ONE_CHANNEL = (
    " Pictures are read as RGB: give it weights whose patch embedding takes three channels, such as "
    "patch_embed.proj.weight.repeat(1, 3, 1, 1) / 3, which sees a grey picture as before."
)


class VisionEncoder(nn.Module):
    """A timm VisionTransformer or Eva as wlsup uses it.

    The forward pass calls timm's submodules themselves, so forward hooks on ``blocks[i]``, ``.attn``, ``.mlp``,
    ``.norm1`` and ``.norm2`` fire, and it runs while `condition_slot` holds the condition. The state dict is
    ``backbone.`` + timm's keys.

    Args:
        backbone: made with ``num_classes=0`` and ``dynamic_img_size=True``.
        image_spec: how pictures are to be prepared for it.
        pooling: "auto" (the model's own convention: timm's ``global_pool``), "cls" or "mean".
        architecture: what rebuilds the backbone (kept for saving).
        base_id: a name for the weights, the same on every machine.

    Raises:
        WlsupError: "cls" for a model without a class token.
    """

    def __init__(
        self,
        backbone: VisionTransformer | Eva,
        image_spec: ImageSpec,
        pooling: str = "auto",
        architecture: Architecture | None = None,
        base_id: str = "",
    ) -> None:
        super().__init__()
        choose("pooling", pooling, ("auto", "cls", "mean"))
        if pooling == "cls" and backbone.cls_token is None:
            raise WlsupError("Pooling 'cls' was asked of a model without a class token; use 'auto' or 'mean'.")
        self.backbone = backbone
        self.image_spec = image_spec
        self.pooling = pooling
        self.architecture = architecture
        self.base_id = base_id
        self.base_sha256 = tensors_sha256(backbone.state_dict())
        self.condition_slot = ConditionSlot()

    @property
    def embed_dim(self) -> int:
        """Width D of the tokens."""
        return int(self.backbone.embed_dim)

    @property
    def num_prefix_tokens(self) -> int:
        """Number P of tokens before the patches: class token and registers."""
        return int(self.backbone.num_prefix_tokens)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.backbone.patch_embed.patch_size[0])

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at the size of `image_spec`'s picture, for which the positions were made."""
        rows, columns = self.backbone.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def blocks(self) -> nn.Sequential | nn.ModuleList:
        """The transformer blocks, in order."""
        return self.backbone.blocks

    def forward(
        self, images: Tensor, condition: Condition | None = None, ids_keep: Tensor | None = None
    ) -> VisionOutput:
        """Encode pictures, wholly or only some of their patches.

        Args:
            images: (B, 3, H, W), normalised; H and W multiples of the patch size. Another size than the model's own
                gets interpolated position embeddings.
            condition: what conditioned adapters may look at; None: the null condition.
            ids_keep: (B, K) indices of the patches to encode, row by row from the top left; None: all. Positions are
                added before the others are left out, and prefix tokens put in front after (He et al. 2022).

        Returns:
            Pooled (B, D) and tokens (B, P + N, D), or (B, P + K, D) with ``ids_keep``.

        Raises:
            WlsupError: pictures of a wrong shape.
        """
        self._check(images)
        backbone = self.backbone
        with self.condition_slot.holding(condition):
            tokens, rope = self._embed(images) if ids_keep is None else self._embed_kept(images, ids_keep)
            tokens = backbone.norm_pre(tokens)
            remat = backbone.grad_checkpointing and torch.is_grad_enabled()
            mixed = getattr(backbone, "rope_mixed", False)
            for index, block in enumerate(backbone.blocks):
                block_rope = rope[index] if mixed and rope is not None else rope
                if remat:
                    kept = self.condition_slot.kept()
                    run = partial(self._run_block, block, rope=block_rope, condition=condition, kept=kept)
                    tokens = checkpoint(run, tokens, use_reentrant=False)
                else:
                    tokens = block(tokens) if block_rope is None else block(tokens, rope=block_rope)
            tokens = backbone.norm(tokens)
            pooled = self._pool(tokens)
        return VisionOutput(pooled=pooled, tokens=tokens, num_prefix_tokens=self.num_prefix_tokens)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D): the whole picture under the null condition; put the model in eval mode yourself."""
        return self(images).pooled

    def _run_block(
        self, block: nn.Module, tokens: Tensor, rope: Tensor | None, condition: Condition | None, kept: dict
    ) -> Tensor:
        # Recomputation happens in the backward pass, when the slot is empty: lay out again the condition, and what the
        # blocks before this one had kept.
        with self.condition_slot.holding(condition, kept):
            return block(tokens) if rope is None else block(tokens, rope=rope)

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> (B, P + N, D), and rotary positions where the model has them."""
        backbone = self.backbone
        tokens = backbone._pos_embed(backbone.patch_embed(images))
        if isinstance(tokens, tuple):
            return tokens
        return backbone.patch_drop(tokens), None

    def _embed_kept(self, images: Tensor, ids_keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W), (B, K) -> (B, P + K, D)."""
        if self._can_embed_kept_only():
            return self._embed_kept_only(images, ids_keep), None
        prefix = self.num_prefix_tokens
        tokens, rope = self._embed(images)
        patches = tokens[:, prefix:].gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :prefix], patches], dim=1)
        if rope is not None:
            # (N, d) -> (B, 1, K, d); with rotary positions of each block: (L, heads, N, d) -> (L, B, heads, K, d).
            rope = rope[ids_keep].unsqueeze(1) if rope.ndim == 2 else rope[:, :, ids_keep].transpose(1, 2)
        return tokens, rope

    def _can_embed_kept_only(self) -> bool:
        """Whether the patch embedding is the plain convolution without anyone's hooks on it."""
        embed = self.backbone.patch_embed
        plain = type(self.backbone) is VisionTransformer and type(embed) is PatchEmbed and type(embed.proj) is nn.Conv2d
        return plain and not any(
            module._forward_hooks or module._forward_pre_hooks for module in (embed, embed.proj, self.backbone.pos_drop)
        )

    def _embed_kept_only(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Embed only the kept patches: the same numbers as embedding all and choosing, at K/N of the cost."""
        backbone = self.backbone
        embed, (batch, channels, height, width) = backbone.patch_embed, images.shape
        side = self.patch_size
        rows, columns = height // side, width // side
        cells = images.reshape(batch, channels, rows, side, columns, side)
        sample = torch.arange(batch, device=images.device)[:, None]
        row, column = ids_keep // columns, ids_keep % columns
        pixels = cells[sample, :, row, :, column].flatten(2)  # (B, K, C * p * p), the order of the kernel's weights
        patches = embed.norm(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))
        prefix = [token for token in (backbone.cls_token, backbone.reg_token) if token is not None]
        if backbone.pos_embed is not None:
            skip = 0 if backbone.no_embed_class else self.num_prefix_tokens
            positions = self.position_embedding((rows, columns))
            patches = patches + F.embedding(ids_keep, positions[0, skip:])
            if prefix and skip:
                prefix = [torch.cat(prefix, dim=1) + positions[:, :skip]]
        tokens = torch.cat([*(token.expand(batch, -1, -1).to(patches.dtype) for token in prefix), patches], dim=1)
        return backbone.pos_drop(tokens)

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Return the learned positions for a grid of (rows, columns) patches: (1, [P +] rows * columns, D)."""
        backbone = self.backbone
        skip = 0 if backbone.no_embed_class else self.num_prefix_tokens
        return resample_abs_pos_embed(
            backbone.pos_embed, new_size=list(grid), old_size=list(self.grid_size), num_prefix_tokens=skip
        )

    def _pool(self, tokens: Tensor) -> Tensor:
        """(B, P + N, D) -> (B, D)."""
        backbone = self.backbone
        if self.pooling == "auto" and backbone.global_pool:
            return backbone.forward_head(tokens, pre_logits=True)
        if self.pooling == "cls" or (self.pooling == "auto" and backbone.cls_token is not None):
            return backbone.fc_norm(tokens[:, 0])
        return backbone.fc_norm(tokens[:, self.num_prefix_tokens :].mean(dim=1))

    def _check(self, images: Tensor) -> None:
        channels, side = self.backbone.patch_embed.proj.in_channels, self.patch_size
        if images.ndim != 4 or images.shape[1] != channels:
            raise WlsupError(
                f"Pictures have shape {tuple(images.shape)}; the encoder takes (B, {channels}, H, W)."
                + (_ONE_CHANNEL if channels == 1 and images.ndim == 4 and images.shape[1] == 3 else "")
            )
        if images.shape[2] % side or images.shape[3] % side or not images.shape[2] or not images.shape[3]:
            raise WlsupError(
                f"Pictures are {images.shape[2]} x {images.shape[3]} pixels; both must be multiples of the patch size, "
                f"{side}."
            )


def build_vision(spec: VisionSpec) -> VisionEncoder:
    """Build the encoder that ``spec`` names, with its weights.

    Args:
        spec: see `VisionSpec`.

    Returns:
        The encoder, in train mode as torch modules begin.

    Raises:
        WlsupError: unknown or lacking weights, a damaged file, or weights that do not fit the architecture.
    """
    return encoder_from(open_source(spec))


def encoder_from(source: Source) -> VisionEncoder:
    """Wrap an opened source's backbone.

    Raises:
        WlsupError: it does not take pictures of three channels.
    """
    channels = source.backbone.patch_embed.proj.in_channels
    if channels != 3:
        raise WlsupError(
            f"The encoder {source.base_id} takes {channels} channel{'s' * (channels != 1)}, and pictures are read as "
            "RGB. Of one channel make three: repeat its patch embedding's weight over them, divided by 3; of a grey "
            "picture it then makes the same."
        )
    return VisionEncoder(source.backbone, source.image_spec, source.pooling, source.architecture, source.base_id)
