"""Encoders that wlsup scores and does not teach: any model of timm's, and programs that `wlsup export` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from wlsup.batch import ImageSpec
from wlsup.errors import WlsupError
from wlsup.models.backbones import timm_vits
from wlsup.models.sources import HUB, VisionSpec, timm_image_spec, timm_weight_file
from wlsup.models.vision import VisionEncoder, build_vision
from wlsup.models.weights import hub_folder, read_json

__all__ = ["ForeignEncoder", "open_encoder"]

PROGRAM = "encoder.pt2"


class ForeignEncoder(nn.Module):
    """What maps pictures to features, and no more: there are no blocks to adapt, and nothing is folded or exported.

    Args:
        encode: (B, 3, H, W) -> (B, D); a module of it is moved along, anything else stays where it is.
        image_spec: how pictures are to be prepared.
        device: where ``encode`` computes, if it cannot be moved.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], image_spec: ImageSpec, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.encode, self.image_spec, self.place = encode, image_spec, device
        self.register_parameter("nothing", nn.Parameter(torch.zeros(1), requires_grad=False))  # tells the device

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.encode(images if self.place is None else images.to(self.place)).to(images.device)


def open_encoder(weights: str, pretrained: bool = True) -> VisionEncoder | ForeignEncoder:
    """Build what ``weights`` names: as `build_vision`, and models of timm's that are no ViTs, and exported programs.

    Args:
        weights: as of `VisionSpec`; or any name of timm's; or a folder with encoder.pt2, or one that timm wrote.
        pretrained: False draws random weights.

    Raises:
        WlsupError: unknown, lacking or damaged, or a program asked for with random weights.
    """
    folder = Path(weights).expanduser()
    if (folder / PROGRAM).is_file():
        if not pretrained:
            raise WlsupError(f"{folder} holds a program, which knows no random weights: give the encoder it began as.")
        return _program(folder)
    if weights.startswith(HUB):
        folder = hub_folder(weights.split(":", 1)[1])
    if (folder / "config.json").is_file():
        name = read_json(folder / "config.json").get("architecture")
        if isinstance(name, str) and _is_foreign(name):
            return _timm(f"local-dir:{folder}", weights, pretrained)
    elif not folder.exists() and _is_foreign(weights):
        file = timm_weight_file(weights) if pretrained else None
        return _timm(weights, weights, pretrained, **({"pretrained_cfg_overlay": {"file": str(file)}} if file else {}))
    return build_vision(VisionSpec(weights=weights, pretrained=pretrained))


def _is_foreign(name: str) -> bool:
    base = name.partition(".")[0]
    return timm.is_model(base) and base not in timm_vits()


def _timm(name: str, told: str, pretrained: bool, **options: Any) -> ForeignEncoder:
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # whatever a download or timm's loader raises
        raise WlsupError(f"timm could not load {told!r} ({type(error).__name__}: {error}).") from error
    return ForeignEncoder(model, timm_image_spec(resolve_model_data_config(model)))


def _program(folder: Path) -> ForeignEncoder:
    try:
        image = read_json(folder / "config.json")["image"]
        spec = ImageSpec(**{**image, "mean": tuple(image["mean"]), "std": tuple(image["std"])})
        program = torch.export.load(folder / PROGRAM)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
    except WlsupError:
        raise
    except Exception as error:  # of a damaged file torch raises many kinds
        raise WlsupError(
            f"{folder} cannot be read ({type(error).__name__}: {error}); copy it again, or export the run again."
        ) from error
    module = program.module()
    return ForeignEncoder(lambda images: module(images), spec, device)  # a program's module has no train and eval
