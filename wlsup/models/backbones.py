"""timm backbones: from an architecture's name to a module, and tensors into it, strictly."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.models import eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wlsup.errors import WlsupError, choose

__all__ = ["Architecture", "create_backbone", "load_tensors", "parse_architecture"]

_VIT_ARGUMENTS = (
    "img_size",
    "patch_size",
    "in_chans",
    "global_pool",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "qk_norm",
    "init_values",
    "class_token",
    "no_embed_class",
    "reg_tokens",
    "pre_norm",
    "fc_norm",
    "norm_eps",
)


@dataclass
class Architecture:
    """A backbone's shape, as it is written to and read from ``config.json``.

    Args:
        name: a timm model name, or "vit" for timm's VisionTransformer built from ``kwargs`` alone.
        kwargs: keyword arguments; for "vit" also ``norm_eps``, the layer norms' epsilon.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inner = ",".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        return f"{self.name}({inner})" if inner else self.name


def parse_architecture(text: str) -> Architecture:
    """Read ``"vit_base_patch16_224"`` or ``"vit(img_size=64,patch_size=8,embed_dim=192,depth=6,num_heads=3)"``.

    Raises:
        WlsupError: an unknown name, an unknown argument, or a value that is not a plain literal.
    """
    call = re.fullmatch(r"\s*vit\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if call is None:
        choose(
            "architecture",
            text.partition(".")[0],
            timm_vits(),
            "Or 'vit(patch_size=…,embed_dim=…,depth=…,num_heads=…)'.",
        )
        return Architecture(text)
    try:
        keywords = ast.parse(f"f({call.group(1) or ''})", mode="eval").body.keywords  # type: ignore[attr-defined]
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
    except (SyntaxError, ValueError) as error:
        raise WlsupError(
            f"Cannot read the architecture {text!r}: write 'vit(patch_size=16,embed_dim=768,…)'."
        ) from error
    for name in kwargs:
        choose("argument of the architecture 'vit'", name, _VIT_ARGUMENTS)
    return Architecture("vit", kwargs)


def timm_vits() -> list[str]:
    """Return the names of timm's models of the two families that `VisionEncoder` drives."""
    return timm.list_models(module="vision_transformer") + timm.list_models(module="eva")


def create_backbone(architecture: Architecture, image_size: int | None = None) -> VisionTransformer | Eva:
    """Build an architecture with random weights, no head, and position embeddings that follow the picture's size.

    Args:
        architecture: what to build.
        image_size: side in pixels the position embedding is made for; None: the architecture's own.

    Raises:
        WlsupError: timm refuses the arguments, the model is of another family, or the size does not fit the patches.
    """
    kwargs = dict(architecture.kwargs)
    if image_size is not None:
        kwargs["img_size"] = image_size
    try:
        if architecture.name == "vit":
            if "norm_eps" in kwargs:
                kwargs["norm_layer"] = partial(nn.LayerNorm, eps=kwargs.pop("norm_eps"))
            backbone = VisionTransformer(num_classes=0, dynamic_img_size=True, **kwargs)
        else:
            backbone = timm.create_model(architecture.name, num_classes=0, dynamic_img_size=True, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise WlsupError(f"Cannot build the architecture {architecture}: {type(error).__name__}: {error}.") from error
    if not isinstance(backbone, VisionTransformer | Eva):
        raise WlsupError(
            f"{architecture.name!r} is a {type(backbone).__name__}; the vision encoder takes timm's VisionTransformer "
            "and Eva families (ViT, DeiT, DINO, DINOv2, DINOv3, MAE, CLIP, SigLIP, EVA)."
        )
    side, patch = backbone.patch_embed.img_size[0], backbone.patch_embed.patch_size[0]
    if side % patch:
        raise WlsupError(
            f"Image size {side} is not a multiple of the patch size {patch} of {architecture.name!r}; "
            f"the nearest that are: {max(side // patch, 1) * patch}, {(side // patch + 1) * patch}."
        )
    return backbone


def load_tensors(
    backbone: VisionTransformer | Eva, tensors: Mapping[str, Tensor], source: str, architecture: str
) -> None:
    """Load an encoder's tensors, resampling position embeddings to the backbone's grid; every key must fit.

    Args:
        backbone: what to load into.
        tensors: in timm's names, or in any layout timm's own filter for the family knows.
        source: what the tensors came from, for messages.
        architecture: what the backbone is, for messages.

    Raises:
        WlsupError: missing or unexpected keys, other shapes, or values that are not finite.
    """
    family = eva if isinstance(backbone, Eva) else vision_transformer
    try:
        given = family.checkpoint_filter_fn(dict(tensors), backbone)
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        raise _misfit(source, architecture, [f"timm cannot convert it ({type(error).__name__}: {error})"]) from error
    check_fit(backbone.state_dict(), given, source, architecture)
    backbone.load_state_dict(given, strict=False)


def check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str, architecture: str) -> None:
    """Compare a checkpoint's tensors with a model's, and raise one error that names a few of the differences.

    Raises:
        WlsupError: missing or unexpected keys, other shapes, or values that are not finite.
    """
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted and not name.startswith("head.")]
    shapes = [
        f"{name!r} is {tuple(given[name].shape)} where the model has {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensors ({_few(missing)})")
    if unexpected:
        problems.append(f"has {len(unexpected)} unknown tensors ({_few(unexpected)})")
    if shapes:
        problems.append(f"has {len(shapes)} tensors of another shape ({_few(shapes)})")
    if problems:
        raise _misfit(source, architecture, problems)
    broken = [name for name, tensor in given.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise WlsupError(f"{source} is damaged: NaN or infinite values in {_few(broken)}. Copy it again.")


def _misfit(source: str, architecture: str, problems: list[str]) -> WlsupError:
    return WlsupError(
        f"{source} does not fit the architecture {architecture}: it {'; it '.join(problems)}. "
        "Set `architecture` to the model that the weights were trained with, or point at other weights."
    )


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
