"""Where an encoder comes from: the package's mini model, timm, the Hugging Face hub, a local file or folder."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
from timm.data import resolve_model_data_config
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from wlsup.batch import ImageSpec
from wlsup.errors import WlsupError, choose
from wlsup.models.backbones import Architecture, create_backbone, load_tensors, parse_architecture, timm_vits
from wlsup.models.layouts import infer_vit, split_checkpoint
from wlsup.models.weights import (
    WEIGHT_SUFFIXES,
    find_weight_file,
    hub_folder,
    read_json,
    read_weights,
    tensors_sha256,
)

__all__ = [
    "FORMAT",
    "HUB",
    "MINI_FOLDER",
    "Source",
    "VisionSpec",
    "open_source",
    "timm_image_spec",
    "timm_weight_file",
]

FORMAT = "wlsup-vision"
MINI_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "mini" / "vision"

_POOLING = ("auto", "cls", "mean")
HUB = ("hf-hub:", "hf_hub:")
# PIL's numbers, as Hugging Face's preprocessor_config.json writes them.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class VisionSpec:
    """Which vision encoder to build.

    Args:
        weights: "mini" (the package's own), a timm name ("vit_base_patch16_224.dino"), "hf-hub:owner/name[@revision]",
            a local file (.safetensors, .pth, .pt, .bin) or a local folder (wlsup's, Hugging Face's or timm's layout).
        architecture: a timm name or "vit(patch_size=…,embed_dim=…,depth=…,num_heads=…)", where a local file does not
            say it, or, with ``pretrained`` off, what to build in place of ``weights``' own.
        image_size: side in pixels, a multiple of the patch size; None: the model's own. Position embeddings are
            resampled to it when loaded.
        pooling: "auto" follows the model's own convention; "cls" the class token; "mean" the mean of the patch tokens.
        pretrained: False keeps the architecture and draws random weights.
        gradient_checkpointing: keep a trained block's input only and compute the rest again in the backward pass
            (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): less memory for more time.
    """

    weights: str = "mini"
    architecture: str | None = None
    image_size: int | None = None
    pooling: Literal["auto", "cls", "mean"] = "auto"
    pretrained: bool = True
    gradient_checkpointing: bool = False


@dataclass
class Source:
    """An opened encoder: the backbone with its weights, and all else the checkpoint said.

    Args:
        backbone: with its weights loaded.
        architecture: rebuilds the backbone.
        image_spec: how pictures are to be prepared.
        pooling: the effective pooling.
        base_id: a name for the weights that is the same on every machine.
        decoder: an MAE decoder's tensors, empty when there are none.
        decoder_config: what the checkpoint says about its decoder (wlsup's names), empty when nothing.
        pretrained: whether weights were loaded.
        name: what messages call it.
    """

    backbone: VisionTransformer | Eva
    architecture: Architecture
    image_spec: ImageSpec
    pooling: str
    base_id: str
    decoder: dict[str, Tensor] = field(default_factory=dict)
    decoder_config: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    name: str = ""


@dataclass
class _Found:
    """What a place holds, before a backbone is made of it."""

    name: str
    base_id: str
    tensors: dict[str, Tensor] | None = None
    decoder: dict[str, Tensor] = field(default_factory=dict)
    decoder_config: dict[str, Any] = field(default_factory=dict)
    architecture: Architecture | None = None
    image: ImageSpec | None = None
    pooling: str | None = None
    dino: bool = False
    use_timm_loader: bool = False


def open_source(spec: VisionSpec) -> Source:
    """Find, read and load what ``spec`` names.

    Raises:
        WlsupError: nothing of the name, a lacking or damaged file, or weights that do not fit the architecture.
    """
    choose("pooling", spec.pooling, _POOLING)
    if not spec.pretrained and spec.architecture:
        architecture = parse_architecture(spec.architecture)
        found = _Found(name=str(architecture), base_id="", architecture=architecture)
    else:
        found = _find(spec)
    if spec.pretrained and spec.architecture:
        found.architecture = parse_architecture(spec.architecture)
    if found.architecture is None:
        raise WlsupError(f"{found.name} does not say its architecture; set `architecture` to a timm name.")
    if spec.pretrained and found.use_timm_loader:
        backbone = _timm_pretrained(spec.weights, spec.image_size)
    else:
        backbone = create_backbone(found.architecture, spec.image_size)
        if spec.pretrained and found.tensors is not None:
            load_tensors(backbone, found.tensors, found.name, str(found.architecture))
    backbone.set_grad_checkpointing(spec.gradient_checkpointing)
    size = backbone.patch_embed.img_size[0]
    architecture = found.architecture
    if spec.image_size is not None:
        architecture = Architecture(architecture.name, {**architecture.kwargs, "img_size": size})
    return Source(
        backbone=backbone,
        architecture=architecture,
        image_spec=_image_spec(found, backbone, spec, size),
        pooling=found.pooling if spec.pooling == "auto" and found.pooling else spec.pooling,
        base_id=found.base_id if spec.pretrained else f"random:{architecture}",
        decoder=found.decoder if spec.pretrained else {},
        decoder_config=found.decoder_config,
        pretrained=spec.pretrained,
        name=found.name,
    )


def _find(spec: VisionSpec) -> _Found:
    """Decide what ``spec.weights`` is, in the order: mini, hub, existing path, path-like, timm name."""
    weights = spec.weights
    if weights == "mini":
        if not (MINI_FOLDER / "config.json").is_file():
            raise WlsupError(
                f"The mini encoder is lacking: looked for {MINI_FOLDER / 'config.json'}. "
                "Install wlsup again from a complete wheel or checkout, or give other `weights`."
            )
        return _read_folder(MINI_FOLDER, "mini", spec)
    if weights.startswith(HUB):
        return _read_folder(hub_folder(weights.split(":", 1)[1]), weights, spec)
    path = Path(weights).expanduser()
    if path.is_dir():
        return _read_folder(path, f"folder:{path.resolve().name}", spec)
    if path.is_file():
        return _read_file(path, spec)
    if path.suffix in WEIGHT_SUFFIXES or weights.startswith(("/", ".", "~")) or weights.count("/") > 1:
        raise WlsupError(
            f"No such file or folder: {weights!r} (looked at {path.absolute()}). Give the path of a weight file "
            f"({', '.join(WEIGHT_SUFFIXES)}) or of a folder with config.json and model.safetensors."
        )
    return _find_timm(weights, spec)


def _find_timm(weights: str, spec: VisionSpec) -> _Found:
    known = timm_vits()
    if not weights or weights.partition(".")[0] not in known:
        usable = [name for name in timm.list_pretrained() if name.partition(".")[0] in known]
        near = difflib.get_close_matches(weights, usable + known, n=3, cutoff=0.5)
        if timm.is_model(weights.partition(".")[0]):
            raise WlsupError(
                f"{weights!r} is a model of timm's, and not one of the ViTs that wlsup teaches (its VisionTransformer "
                f"and Eva{', such as ' + ', '.join(near) if near else ''}). `wlsup knn` and `wlsup evaluate` score it."
            )
        raise WlsupError(
            f"Unknown vision weights {weights!r}: not 'mini', not an existing file or folder, and not a ViT of timm's"
            f"{' (near: ' + ', '.join(near) + ')' if near else ''}. Allowed: 'mini', a timm name such as "
            "'vit_base_patch16_224.dino', 'hf-hub:owner/name', or the path of a file or folder."
        )
    found = _Found(name=f"timm's {weights}", base_id=f"timm:{weights}", architecture=Architecture(weights))
    if not spec.pretrained:
        return found
    file = timm_weight_file(weights)
    if file is None:
        found.use_timm_loader = True
    else:
        found.tensors = split_checkpoint(read_weights(file)).encoder
    return found


def timm_weight_file(weights: str) -> Path | None:
    """Return the local file of a timm model's weights, fetched through the hub's cache; None where timm alone can.

    Raises:
        WlsupError: it has none, or they are neither here nor to be fetched.
    """
    config = timm.models.get_pretrained_cfg(weights)
    if config is None or not config.has_weights:
        tags = timm.list_pretrained(weights.partition(".")[0] + ".*")
        raise WlsupError(
            f"timm has no pretrained weights for {weights!r}; it has {', '.join(tags) or 'none of this model'}. "
            "Choose one of these, or set `pretrained` to false for random weights."
        )
    if config.hf_hub_id and not config.custom_load and not config.hf_hub_filename:
        # Through the hub's cache directly: timm would retry for most of a minute before admitting there is no network.
        try:
            folder = hub_folder(config.hf_hub_id)
        except WlsupError as error:
            raise WlsupError(f"Cannot load {weights!r}. {error} With it set `architecture: {weights}`.") from error
        return find_weight_file(folder)
    return None


def _timm_pretrained(name: str, image_size: int | None) -> VisionTransformer | Eva:
    """Let timm fetch weights that only its own loader reads (npz files, direct links)."""
    size = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True, **size)
    except Exception as error:  # whatever the download or timm's loader raises
        raise WlsupError(f"timm could not load {name!r} ({type(error).__name__}: {error}).") from error


def _read_file(path: Path, spec: VisionSpec) -> _Found:
    layout = split_checkpoint(read_weights(path))
    found = _Found(name=str(path), base_id=f"file:{path.name}", tensors=layout.encoder, decoder=layout.decoder)
    found.dino = layout.dino
    if spec.architecture is None:
        sibling = path.parent / "config.json"
        if sibling.is_file():
            _apply_config(found, read_json(sibling), path.parent)
        if found.architecture is None:
            found.architecture = Architecture("vit", infer_vit(layout.encoder, str(path)))
    return found


def _read_folder(folder: Path, base_id: str, spec: VisionSpec) -> _Found:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    # Random weights need only the configuration, where it says the architecture.
    wanted = spec.pretrained or not config
    content = read_weights(find_weight_file(folder)) if wanted else {}
    if config.get("format") == FORMAT and content and config.get("sha256") not in (None, tensors_sha256(content)):
        raise WlsupError(
            f"{folder} is damaged: model.safetensors is not the file that config.json describes. Copy it again."
        )
    layout = split_checkpoint(content)
    found = _Found(name=str(folder), base_id=base_id, tensors=layout.encoder, decoder=layout.decoder)
    _apply_config(found, config, folder)
    if found.architecture is None and spec.architecture is None:
        found.architecture = Architecture("vit", infer_vit(layout.encoder, str(folder)))
    return found


def _apply_config(found: _Found, config: dict[str, Any], folder: Path) -> None:
    """Take from a folder's config.json what it says: wlsup's, Hugging Face's or timm's."""
    try:
        if config.get("format") == FORMAT:
            found.architecture = Architecture(config["architecture"]["name"], dict(config["architecture"]["kwargs"]))
            image = config["image"]
            found.image = ImageSpec(**{**image, "mean": tuple(image["mean"]), "std": tuple(image["std"])})
            found.pooling = config["pooling"]
            found.decoder_config = config.get("decoder") or {}
        elif config.get("model_type") in ("vit", "vit_mae"):
            _apply_transformers(found, config, folder)
        elif isinstance(config.get("architecture"), str):
            found.architecture = parse_architecture(config["architecture"])
            found.architecture.kwargs |= config.get("model_args") or {}
            pretrained = config.get("pretrained_cfg") or {}
            found.image = timm_image_spec(pretrained)
            found.dino = "dino" in str(pretrained.get("tag", "")).lower()
        elif "model_type" in config:
            raise WlsupError(
                f"{folder} holds a Hugging Face model of type {config['model_type']!r}; known here: 'vit', 'vit_mae'."
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, WlsupError):
            raise
        raise WlsupError(
            f"{folder / 'config.json'} is incomplete ({type(error).__name__}: {error}); copy it again."
        ) from error


def _apply_transformers(found: _Found, config: dict[str, Any], folder: Path) -> None:
    if config.get("hidden_act", "gelu") != "gelu":
        raise WlsupError(f"{folder} uses the activation {config['hidden_act']!r}; only 'gelu' is known here.")
    width = config["hidden_size"]
    kwargs = {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config.get("num_channels", 3),
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / width,
        "qkv_bias": config.get("qkv_bias", True),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
    }
    found.architecture = Architecture("vit", kwargs)
    if config["model_type"] == "vit_mae":
        found.decoder_config = {
            "heads": config["decoder_num_attention_heads"],
            "norm_eps": config.get("layer_norm_eps", 1e-12),
        }
    if (folder / "preprocessor_config.json").is_file():
        prepared = read_json(folder / "preprocessor_config.json")
        default = ImageSpec()
        found.image = ImageSpec(
            size=kwargs["img_size"],
            mean=tuple(prepared.get("image_mean", default.mean)),
            std=tuple(prepared.get("image_std", default.std)),
            interpolation=_RESAMPLE.get(prepared.get("resample"), default.interpolation),
            resize=_dino_resize(kwargs["img_size"]),
        )


def timm_image_spec(config: dict[str, Any]) -> ImageSpec | None:
    """Return how pictures are to be prepared by a data configuration of timm's; None where it names no size."""
    if "input_size" not in config:
        return None
    size, default = int(config["input_size"][-1]), ImageSpec()
    return ImageSpec(
        size=size,
        mean=tuple(config.get("mean", default.mean)),
        std=tuple(config.get("std", default.std)),
        interpolation=config.get("interpolation", default.interpolation),
        resize=math.floor(size / config.get("crop_pct", 0.875)),
    )


def _image_spec(found: _Found, backbone: VisionTransformer | Eva, spec: VisionSpec, size: int) -> ImageSpec:
    """Settle how pictures are prepared: what the checkpoint says, else timm's data configuration."""
    image = found.image
    if image is None and getattr(backbone, "pretrained_cfg", None):
        image = timm_image_spec({**resolve_model_data_config(backbone), "input_size": (3, size, size)})
    if image is None:
        image = ImageSpec(size=size, resize=_dino_resize(size))
    if image.size != size:
        image = replace(image, size=size, resize=round(size * image.resize / image.size))
    named = "dino" in f"{Path(spec.weights).name} {spec.architecture or ''} {found.architecture}".lower()
    if found.pooling is None and (named or found.dino):
        # DINO's published k-NN resizes to 256 for a crop of 224, where timm's crop_pct gives 248.
        image = replace(image, resize=_dino_resize(size))
    return image


def _dino_resize(size: int) -> int:
    return round(size * 256 / 224)
