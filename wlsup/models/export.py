"""An encoder for people without wlsup: a folder that timm loads, or a program that torch loads; each is tried here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from wlsup.batch import ImageSpec
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionEncoder
from wlsup.models.weights import write_folder

__all__ = ["TOLERANCE", "difference_of", "timm_config", "try_pictures", "write_program", "write_timm"]

TOLERANCE = 1e-5
"""Largest difference of a feature between the encoder here and what was written, against features of order 1."""

_DEFAULT_EPS = 1e-6
_BATCH = 3
_MOST = 2**20
"""Pictures in a batch of a program; some torch versions want a limit."""


def timm_config(encoder: VisionEncoder) -> dict[str, Any] | None:
    """Return the config.json by which ``timm.create_model("local-dir:...")`` or ``"hf-hub:..."`` rebuilds an encoder.

    Args:
        encoder: a plain one, without adapters.

    Returns:
        Architecture, arguments and how pictures are prepared; None of an encoder whose architecture is not known, or
        has layer norms that timm's own name for it does not make.
    """
    if encoder.architecture is None:
        return None
    name, arguments = encoder.architecture.name.partition(".")[0], dict(encoder.architecture.kwargs)
    if name == "vit":  # timm's VisionTransformer from its arguments alone, whose defaults are those of this name
        name = "vit_base_patch16_224"
        if arguments.pop("norm_eps", _DEFAULT_EPS) != _DEFAULT_EPS:
            return None
    spec = encoder.image_spec
    arguments["img_size"] = spec.size
    arguments |= _pooling(encoder)
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "wlsup",
            "custom_load": False,
            "input_size": [encoder.backbone.patch_embed.proj.in_channels, spec.size, spec.size],
            "fixed_input_size": True,
            "interpolation": spec.interpolation,
            "crop_pct": spec.size / spec.resize,
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def write_timm(encoder: VisionEncoder, folder: Path) -> float | None:
    """Write model.safetensors and config.json in timm's own layout, and load them again through timm.

    Args:
        encoder: a plain one.
        folder: made if need be.

    Returns:
        The largest difference between the features here and timm's; None if timm has no such model, or another one:
        what was written is then taken away.
    """
    config = timm_config(encoder)
    if config is None:
        return None
    write_folder(folder, encoder.backbone.state_dict(), config)
    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        difference = difference_of(encoder, loaded)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError):  # timm's ways to say that it cannot
        difference = float("inf")
    if difference <= TOLERANCE:
        return difference
    for file in ("model.safetensors", "config.json"):
        (folder / file).unlink()
    return None


def write_program(encoder: VisionEncoder, adapters: Sequence[nn.Module], folder: Path) -> float:
    """Write encoder.pt2: the encoder under the null condition, its adapters at work, as a `torch.export` program.

    The batch is left open. A module that asks for its size by ``len(tensor)`` closes it: ``tensor.shape[0]`` does not.

    Args:
        encoder: with what is attached to it.
        adapters: the modules that its hooks run.
        folder: made if need be.

    Returns:
        The largest difference between the features here and the program's.

    Raises:
        WlsupError: torch cannot export it, or what it exported computes something else.
    """
    size = encoder.image_spec.size
    example = torch.zeros(_BATCH, encoder.backbone.patch_embed.proj.in_channels, size, size)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            program = torch.export.export(
                _Features(encoder, adapters).eval(),
                (example,),
                dynamic_shapes={"images": {0: torch.export.Dim("batch", max=_MOST)}},
                strict=False,
            )
        torch.export.save(program, folder / "encoder.pt2")
        loaded = torch.export.load(folder / "encoder.pt2").module()
        difference = difference_of(encoder, loaded)
    except Exception as error:  # torch.export raises its own, and whatever tracing meets
        raise WlsupError(
            f"torch cannot export this encoder ({type(error).__name__}: {str(error).splitlines()[0][:200]}). Export "
            "its adapter alone, with --adapter-only."
        ) from error
    if not difference <= TOLERANCE:
        raise WlsupError(
            f"The exported program's features differ from the encoder's by {difference:.1e}, more than {TOLERANCE:g}. "
            "Export its adapter alone, with --adapter-only."
        )
    return difference


def try_pictures(spec: ImageSpec, channels: int = 3, count: int = 5) -> Tensor:
    """Return (count, channels, size, size) normal noise, the same every time, to compare two encoders on."""
    return torch.randn(count, channels, spec.size, spec.size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def difference_of(encoder: VisionEncoder, other: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference of two encoders' features on noise, in a batch and alone.

    Args:
        encoder: in eval mode.
        other: (B, 3, H, W) -> (B, D).

    Returns:
        Against features of order 1: divided by the largest of ``encoder``'s where that is above 1.
    """
    images = try_pictures(encoder.image_spec, encoder.backbone.patch_embed.proj.in_channels)
    here = encoder.features(images)
    worst = max((here - other(images)).abs().max(), (here[:1] - other(images[:1])).abs().max())
    return float(worst / max(1.0, float(here.abs().max())))


class _Features(nn.Module):
    """``features`` as a module's forward pass; it owns the adapters so that their tensors are saved once, by name."""

    def __init__(self, encoder: VisionEncoder, adapters: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoder, self.adapters = encoder, nn.ModuleList(adapters)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.encoder.features(images)


def _pooling(encoder: VisionEncoder) -> dict[str, Any]:
    """Return timm's arguments for what `VisionEncoder` does with the tokens after the final norm."""
    backbone = encoder.backbone
    if encoder.pooling == "auto" and backbone.global_pool:
        return {}
    after = not isinstance(backbone.fc_norm, nn.Identity)  # the norm comes after pooling, as in timm's own "avg"
    token = encoder.pooling == "cls" or (encoder.pooling == "auto" and backbone.cls_token is not None)
    return {"global_pool": "token" if token else "avg", "fc_norm": after}
