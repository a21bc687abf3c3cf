"""Checkpoint layouts: from what FAIR, Hugging Face, timm or wlsup wrote to timm's names, and back to Hugging Face's.

A checkpoint becomes an encoder in timm's names (``blocks.0.attn.qkv.weight``) and, where it has one, a decoder in the
names of `wlsup.models.mae.MAEDecoder` (``blocks.0.attn.qkv.weight``, ``mask_token``, ``pos_embed``, ``pred.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = ["Layout", "infer_vit", "split_checkpoint", "to_transformers"]

# The tensor that every ViT has, in timm's and in Hugging Face's names: what comes before it is the encoder's prefix.
_ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")

# Where the wrappers keep the weights, best first: DINO's teacher is the published one.
_WRAPPERS = ("teacher", "model", "state_dict", "model_state_dict", "module")

# What a feature extractor leaves behind: classifiers, poolers, projection heads, a masked-image token.
_IGNORED = re.compile(r"^(head|head_dist|pooler|classifier|pre_logits)\.|^embeddings\.mask_token$")

_BLOCK_NAMES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = {"query": "q", "key": "k", "value": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v"}
_QKV_NAME = re.compile(r"^attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)$")
_BLOCK = re.compile(
    r"^(?:encoder\.layer|decoder_encoder\.layer|decoder_layers|layers|layer)\.(\d+)\.(.+)\.(weight|bias)$"
)
_HF_ENCODER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}

# Head dimension is not in the tensors; these are the widths whose number of heads the literature agrees on.
_USUAL_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


@dataclass
class Layout:
    """A checkpoint taken apart.

    Args:
        encoder: tensors in timm's names, heads left out.
        decoder: tensors in `MAEDecoder`'s names; empty when the checkpoint has no decoder.
        kind: "timm" (FAIR's MAE and DINO use the same names), "transformers", or "unknown" (no ViT's patch embedding
            found; a timm model's own filter may still know it).
        dino: whether it is a checkpoint of DINO's training, with a teacher in it.
    """

    encoder: dict[str, Tensor] = field(default_factory=dict)
    decoder: dict[str, Tensor] = field(default_factory=dict)
    kind: str = "timm"
    dino: bool = False


def split_checkpoint(content: Mapping[str, Any]) -> Layout:
    """Take a checkpoint apart, whatever wrapper and prefixes it has.

    Args:
        content: as `read_weights` returns it: flat, or nested as FAIR's ``{"model": ...}``, DINO's
            ``{"teacher": {"backbone.…"}}`` or Lightning's ``{"state_dict": ...}``.

    Returns:
        Its layout, floating tensors in fp32.
    """
    tensors = _unwrap(content)
    found = [name[: -len(anchor)] for anchor in _ANCHORS for name in tensors if name.endswith(anchor)]
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if not found:
        return Layout(encoder=dict(tensors), kind="unknown")
    prefix = min(found, key=lambda name: ("teacher" not in name, len(name), name))
    inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if _ANCHORS[0] not in inside:
        outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix) or not prefix}
        return _from_transformers(inside, outside)
    decoder = {name: tensor for name, tensor in inside.items() if name.startswith("decoder_") or name == "mask_token"}
    layout = Layout(dino="teacher" in content)
    if "decoder_pred.weight" in decoder:
        layout.decoder = {name.removeprefix("decoder_"): tensor for name, tensor in decoder.items()}
        inside = {name: tensor for name, tensor in inside.items() if name not in decoder}
    own = prefix.removesuffix("encoder.backbone.") + "decoder."
    if prefix.endswith("encoder.backbone.") and own + "pred.weight" in tensors:
        layout.decoder = {name[len(own) :]: value for name, value in tensors.items() if name.startswith(own)}
    layout.encoder = {name: tensor for name, tensor in inside.items() if not _IGNORED.match(name)}
    return layout


def infer_vit(encoder: Mapping[str, Tensor], source: str, num_heads: int | None = None) -> dict[str, Any]:
    """Read a VisionTransformer's keyword arguments off its tensors.

    Args:
        encoder: tensors in timm's names.
        source: what the tensors came from, for messages.
        num_heads: attention heads; by default what the literature has for the width (the tensors do not say).

    Returns:
        timm `VisionTransformer` keyword arguments.

    Raises:
        WlsupError: the tensors are not a plain ViT's, or the number of heads has to be guessed.
    """
    projection = encoder.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        raise WlsupError(
            f"{source} is not a ViT checkpoint in a layout known here (FAIR MAE, DINO, timm, Hugging Face ViT or "
            f"ViTMAE): it has no patch embedding; it begins with {_few(encoder)}. If timm knows its layout, set "
            "`architecture` to the timm name."
        )
    embed_dim, channels, patch_size, _ = projection.shape
    depth = 1 + max((int(name.split(".")[1]) for name in encoder if re.match(r"blocks\.\d+\.", name)), default=-1)
    fc1, positions = encoder.get("blocks.0.mlp.fc1.weight"), encoder.get("pos_embed")
    if depth == 0 or fc1 is None or positions is None or "blocks.0.attn.qkv.weight" not in encoder:
        raise WlsupError(f"{source} is not a plain ViT ({_few(encoder)}); set `architecture` to the timm model it is.")
    heads = num_heads or _USUAL_HEADS.get(embed_dim)
    if heads is None:
        example = f"patch_size={patch_size},embed_dim={embed_dim},depth={depth},num_heads={embed_dim // 64 or 1}"
        raise WlsupError(
            f"{source} has width {embed_dim}, and a checkpoint does not say how many heads that means. "
            f"Set `architecture`, for example 'vit({example})'."
        )
    class_token, registers = "cls_token" in encoder, encoder.get("reg_token")
    prefix = int(class_token) + (0 if registers is None else registers.shape[1])
    with_prefix = round((positions.shape[1] - prefix) ** 0.5)
    without = round(positions.shape[1] ** 0.5)
    no_embed_class = prefix > 0 and with_prefix**2 != positions.shape[1] - prefix and without**2 == positions.shape[1]
    grid = without if no_embed_class else with_prefix
    kwargs: dict[str, Any] = {
        "img_size": grid * patch_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": fc1.shape[0] / embed_dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in encoder,
        "class_token": class_token,
        "reg_tokens": 0 if registers is None else registers.shape[1],
        "no_embed_class": no_embed_class,
        "pre_norm": "norm_pre.weight" in encoder,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in encoder else None,
        "global_pool": "token" if class_token else "avg",
        "fc_norm": False,
    }
    if "fc_norm.weight" in encoder and "norm.weight" not in encoder:
        kwargs |= {"global_pool": "avg", "fc_norm": True}
    return kwargs


def to_transformers(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an MAE's tensors to those of the hub's ViTMAEForPreTraining checkpoints (``facebook/vit-mae-base``).

    Args:
        encoder: in timm's names.
        decoder: in `MAEDecoder`'s names.

    Returns:
        Tensors that ``ViTMAEForPreTraining.from_pretrained`` loads.
    """
    names = {ours: theirs for theirs, ours in _HF_ENCODER.items()}
    out = {f"vit.{names[name]}": tensor for name, tensor in encoder.items() if name in names}
    out |= _blocks_to_transformers(encoder, "vit.encoder.layer")
    for name, tensor in decoder.items():
        if not name.startswith("blocks."):
            out[f"decoder.{name}" if name == "mask_token" else f"decoder.decoder_{name}"] = tensor
    return out | _blocks_to_transformers(decoder, "decoder.decoder_layers")


def _unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Follow wrappers down to a flat state dict; anything that is not a tensor is dropped."""
    for _ in range(4):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _from_transformers(inside: Mapping[str, Tensor], outside: Mapping[str, Tensor]) -> Layout:
    layout = Layout(kind="transformers")
    body = {
        name: tensor for name, tensor in inside.items() if not _IGNORED.match(name) and not name.startswith("decoder.")
    }
    layout.encoder = _fuse(body, _HF_ENCODER)
    decoder = {name.removeprefix("decoder."): value for name, value in outside.items() if name.startswith("decoder.")}
    if "decoder_pred.weight" in decoder:
        # The blocks first: their names, "decoder_layers.0.…", begin like the others'.
        plain = {name: name.removeprefix("decoder_") for name in decoder if not _BLOCK.match(name)}
        layout.decoder = _fuse(decoder, plain)
    return layout


def _fuse(tensors: Mapping[str, Tensor], plain: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename Hugging Face's tensors, and join each block's query, key and value into timm's qkv."""
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.match(name)
        if block is None:
            out[plain.get(name, name)] = tensor
            continue
        index, inner, leaf = block.groups()
        qkv = _QKV_NAME.match(inner)
        if qkv:
            parts.setdefault(f"blocks.{index}.attn.qkv.{leaf}", {})[_QKV[qkv.group(1)]] = tensor
        else:
            out[f"blocks.{index}.{_BLOCK_NAMES.get(inner, inner)}.{leaf}"] = tensor
    for name, part in parts.items():
        # An incomplete triple is left out: the loader then names the fused tensor as missing.
        if part.keys() == {"q", "k", "v"}:
            out[name] = torch.cat([part["q"], part["k"], part["v"]])
    return out


def _blocks_to_transformers(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    back = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = re.match(r"^blocks\.(\d+)\.(.+)\.(weight|bias)$", name)
        if block is None:
            continue
        index, inner, leaf = block.groups()
        if inner == "attn.qkv":
            for kind, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"{prefix}.{index}.attention.attention.{kind}.{leaf}"] = part
        else:
            out[f"{prefix}.{index}.{back[inner]}.{leaf}"] = tensor
    return out


def _few(tensors: Mapping[str, Tensor], count: int = 4) -> str:
    names = list(tensors)[:count]
    return ", ".join(names) + (", …" if len(tensors) > count else "") if names else "no tensors at all"
