"""Saving encoders and masked autoencoders: wlsup's own folder, and Hugging Face's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wlsup.errors import WlsupError
from wlsup.models.layouts import to_transformers
from wlsup.models.sources import FORMAT
from wlsup.models.weights import tensors_sha256, write_folder

if TYPE_CHECKING:
    from wlsup.models.mae import MaskedAutoencoder
    from wlsup.models.vision import VisionEncoder

__all__ = ["export_transformers", "save_mae", "save_vision"]


def save_mae(mae: MaskedAutoencoder, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write an autoencoder in wlsup's own format, which `build_vision` and `build_mae` load from the folder.

    Args:
        mae: what to save; detach adapters first, they are saved by their own checkpoints.
        folder: gets ``model.safetensors`` (encoder.backbone.* in timm's names, decoder.*) and ``config.json``.
        dtype: of the floating tensors on disk; torch.float16 halves the file, and loading gives fp32 again.

    Returns:
        The folder.

    Raises:
        WlsupError: the encoder does not know its architecture, or the folder cannot be written.
    """
    described = {
        name: value for name, value in asdict(mae.decoder_spec).items() if name not in ("pretrained", "warmup_batches")
    }
    decoder = {f"decoder.{name}": tensor for name, tensor in _weights(mae).items()}
    return _save(mae.encoder, decoder, described | {"norm_eps": mae.decoder.norm.eps}, Path(folder), dtype)


def _weights(mae: MaskedAutoencoder) -> dict[str, Tensor]:
    """Return the decoder's tensors, without the count of a warm-up."""
    return {name: tensor for name, tensor in mae.decoder.state_dict().items() if name != "warmed"}


def save_vision(encoder: VisionEncoder, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write an encoder alone in wlsup's own format, which `build_vision` loads from the folder.

    Args:
        encoder: what to save, without adapters.
        folder: gets ``model.safetensors`` and ``config.json``.
        dtype: of the floating tensors on disk.

    Returns:
        The folder.

    Raises:
        WlsupError: the encoder does not know its architecture, or the folder cannot be written.
    """
    return _save(encoder, {}, None, Path(folder), dtype)


def export_transformers(mae: MaskedAutoencoder, folder: str | Path) -> Path:
    """Write an autoencoder as a Hugging Face folder, for ``ViTMAEForPreTraining.from_pretrained``.

    Args:
        mae: a plain ViT with a class token and no registers.
        folder: gets ``model.safetensors`` and ``config.json``.

    Returns:
        The folder.

    Raises:
        WlsupError: the encoder is not such a ViT, or its norms' epsilon differs from the decoder's.
    """
    encoder, decoder = mae.encoder, mae.decoder
    backbone, block, inner = encoder.backbone, encoder.blocks[0], decoder.blocks[0]
    names = {name.split(".")[-2] for name in encoder.backbone.state_dict() if name.startswith("blocks.0.")}
    plain = names <= {"norm1", "norm2", "qkv", "proj", "fc1", "fc2"} and encoder.num_prefix_tokens == 1
    if not plain or backbone.norm.__class__ is nn.Identity or getattr(backbone, "no_embed_class", False):
        raise WlsupError(
            "Only a plain ViT with one class token and a final norm has a Hugging Face ViTMAE counterpart."
        )
    if decoder.norm.eps != backbone.norm.eps:
        raise WlsupError(
            f"Layer norms differ: epsilon {backbone.norm.eps} in the encoder, {decoder.norm.eps} in the decoder."
        )
    config = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": backbone.norm.eps,
        "image_size": encoder.grid_size[0] * encoder.patch_size,
        "patch_size": encoder.patch_size,
        "num_channels": backbone.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "decoder_hidden_size": decoder.embed.out_features,
        "decoder_num_hidden_layers": len(decoder.blocks),
        "decoder_num_attention_heads": inner.attn.num_heads,
        "decoder_intermediate_size": inner.mlp.fc1.out_features,
        "mask_ratio": 0.75,
        "norm_pix_loss": mae.normalize_pixels,
    }
    return write_folder(folder, to_transformers(backbone.state_dict(), _weights(mae)), config)


def _save(
    encoder: VisionEncoder, others: dict[str, Tensor], decoder: dict[str, Any] | None, folder: Path, dtype: torch.dtype
) -> Path:
    if encoder.architecture is None:
        raise WlsupError(
            "This encoder was not made by build_vision: its architecture is not known, so it cannot be saved."
        )
    tensors = {f"encoder.backbone.{name}": tensor for name, tensor in encoder.backbone.state_dict().items()} | others
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    config = {
        "format": FORMAT,
        "version": 1,
        "architecture": asdict(encoder.architecture),
        "image": asdict(encoder.image_spec),
        "pooling": encoder.pooling,
        "decoder": decoder,
        "sha256": tensors_sha256(tensors),
    }
    return write_folder(folder, tensors, config)
