"""MoE checkpoints: a folder that holds an upcycled model, readable whole or expert by expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wlsup.batch import ImageSpec
from wlsup.errors import WlsupError
from wlsup.models.backbones import Architecture, create_backbone
from wlsup.models.caption_tokens import load_tokenizer, transformers_folder
from wlsup.models.language import LanguageModel, LanguageSpec, fuse_gelu
from wlsup.models.saving import save_vision
from wlsup.models.vision import VisionEncoder
from wlsup.models.weights import read_json, read_weights, tensors_sha256, write_folder
from wlsup.moe.prefix_ids import PrefixTokenIds
from wlsup.moe.spec import MoESpec
from wlsup.moe.upcycle import moe_layers, restore, upcycle

__all__ = ["FORMAT", "MoELanguageModel", "load_moe", "read_expert", "save_dense", "save_moe"]

FORMAT = "wlsup-moe"
_VERSION = 1
_WEIGHTS = "model.safetensors"


class MoELanguageModel(LanguageModel):
    """A language model from an MoE checkpoint; all that a `LanguageModel` is, its blocks' MLPs being MoE layers.

    Args:
        model: transformers' model, upcycled.
        folder: the checkpoint, which also holds the tokenizer.
        base: id and hash of the weights.
        max_length: captions are cut to this many tokens.
    """

    def __init__(self, model: nn.Module, folder: Path, base: dict[str, str], max_length: int = 32) -> None:
        nn.Module.__init__(self)
        self.spec = LanguageSpec(weights=str(folder), max_length=max_length)
        self.tokenizer = load_tokenizer(str(folder), max_length)
        self.model = model.eval()
        self.base = base


def save_moe(
    model: VisionEncoder | LanguageModel,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> Path:
    """Write an upcycled model, trained since or not.

    Args:
        model: in which `upcycle` replaced MLPs.
        folder: gets ``model.safetensors``, under the model's own keys, ``config.json``, and a language model's
            tokenizer.
        dtype: of the floating tensors on disk but the routers', which stay as they are; None: as they are.
        made_by: what to note of how it was made (noise, seed, clusters).

    Returns:
        The folder.

    Raises:
        WlsupError: no MoE layer, an encoder that does not know its architecture, or a folder that cannot be written.
    """
    layers = moe_layers(model)
    if not layers:
        raise WlsupError("The model has no MoE layer, so it is no MoE checkpoint: upcycle() it first.")
    tensors = _distinct(model.state_dict())
    if dtype is not None:
        routed = tuple(f"{name}.experts." for name in layers)
        kept = tuple(f"{name}." for name in layers)
        tensors = {
            name: value.to(dtype)
            if value.is_floating_point() and (name.startswith(routed) or not name.startswith(kept))
            else value
            for name, value in tensors.items()
        }
    language, first = isinstance(model, LanguageModel), next(iter(layers.values()))
    if other := next((name for name, layer in layers.items() if layer.spec != first.spec), None):
        raise WlsupError(f"The MoE layers have different settings, first {other}; a checkpoint keeps one for all.")
    config = {
        "format": FORMAT,
        "version": _VERSION,
        "kind": "language" if language else "vision",
        "base": dict(model.base) if language else {"id": model.base_id, "sha256": model.base_sha256},
        "dense": model.model.config.to_dict() if language else _vision_config(model),
        "layers": list(layers),
        "spec": asdict(first.spec),
        "prefix": 0 if first.token_ids is None else first.token_ids.positions,
        "made_by": dict(made_by or {}),
        **({"max_length": model.spec.max_length} if language else {}),
        "sha256": tensors_sha256(tensors),
    }
    folder = write_folder(folder, tensors, config)
    if language:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(transformers_folder(model.spec.weights)).save_pretrained(folder)
    return folder


def load_moe(folder: str | Path) -> VisionEncoder | MoELanguageModel:
    """Read what `save_moe` wrote.

    Raises:
        WlsupError: no MoE checkpoint, or a damaged or incomplete one.
    """
    folder = Path(folder)
    config = _config(folder)
    tensors = dict(read_weights(folder / _WEIGHTS))
    if config["sha256"] != tensors_sha256(tensors):
        raise WlsupError(f"{folder} is damaged: {_WEIGHTS} is not the file that config.json describes. Copy it again.")
    model = _vision(config) if config["kind"] == "vision" else _language(config, folder)
    spec, token_ids, frequencies = MoESpec(**config["spec"]), None, None
    if spec.router == "hash":
        token_ids = PrefixTokenIds(model.vocabulary, config["prefix"])
        frequencies = torch.ones(token_ids.rows)  # the table itself is in the file
    chosen = [_place(name)[0] for name in config["layers"]]
    upcycle(model, chosen, spec, exact=False, token_ids=token_ids, frequencies=frequencies)
    own = model.state_dict()
    # Tensors that a model uses twice (tied embeddings) are in the file once.
    storages = {own[name].data_ptr() for name in tensors if name in own}
    lacking = [name for name in own if name not in tensors and own[name].data_ptr() not in storages]
    unknown = [name for name in tensors if name not in own]
    if lacking or unknown:
        raise WlsupError(
            f"{folder} does not fit its config.json: {_WEIGHTS} lacks {len(lacking)} tensors and has {len(unknown)} "
            f"unknown ones (first {(lacking + unknown)[0]!r}). Copy it again."
        )
    model.load_state_dict(tensors, strict=False)
    return model


def read_expert(folder: str | Path, block: int, expert: int, slot: str = "mlp") -> dict[str, Tensor]:
    """Read one expert of one block, without reading the rest of the file.

    Args:
        folder: an MoE checkpoint, or what ``wlsup export --adapter-only`` made of a run of magma_moe.
        block: position of the block.
        expert: position of the expert.
        slot: "mlp", or "attention" for a mixture of adapters there.

    Returns:
        The expert's tensors under its own keys, for ``layer.experts[expert].load_state_dict``.

    Raises:
        WlsupError: neither of the two, a damaged one, or a block or expert that it does not have.
    """
    folder = Path(folder)
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and read_json(adapter).get("format") == "wlsup-adapter":
        weights = folder / "adapter_model.safetensors"
    else:
        _config(folder)
        weights = folder / _WEIGHTS
    try:
        with safe_open(weights, framework="pt") as file:
            there = _experts(file.keys())
            if (block, slot) not in there:
                others = [str(at) if other == slot else f"{at} ({other})" for at, other in sorted(there)] or ["none"]
                raise WlsupError(
                    f"Block {block} of {folder}, at its {slot}, is no MoE layer; those that are: {', '.join(others)}."
                )
            experts = there[block, slot]
            if expert not in experts:
                raise WlsupError(f"There is no expert {expert}: {folder} has experts 0 to {max(experts)}.")
            return {own: file.get_tensor(name) for own, name in experts[expert].items()}
    except (SafetensorError, OSError) as error:
        raise WlsupError(f"{weights} is damaged ({error}): copy it again.") from error


def save_dense(model: VisionEncoder | LanguageModel, folder: str | Path) -> Path:
    """Write the dense model that an upcycled one was made from, where no expert was trained.

    Args:
        model: as `load_moe` gives it; its MLPs are restored in place.
        folder: gets an encoder in wlsup's own format, or a language model and tokenizer in transformers'.

    Returns:
        The folder.

    Raises:
        WlsupError: the experts of a layer differ, or the folder cannot be written.
    """
    restore(model)
    if not isinstance(model, LanguageModel):
        return save_vision(model, folder)
    from transformers import AutoTokenizer

    folder = Path(folder)
    try:
        model.model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(transformers_folder(model.spec.weights)).save_pretrained(folder)
    except OSError as error:
        raise WlsupError(f"Cannot write weights to {folder}: {error}.") from error
    return folder


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if config.get("format") != FORMAT:
        raise WlsupError(f"{folder} is no MoE checkpoint: its config.json does not say format {FORMAT!r}.")
    if config.get("version", 1) > _VERSION:
        raise WlsupError(
            f"{folder} was written by a newer wlsup (version {config['version']} of {FORMAT}): update this one."
        )
    wanted = {"kind", "base", "dense", "layers", "spec", "prefix", "sha256"}
    if lacking := sorted(wanted - set(config)):
        raise WlsupError(f"{folder / 'config.json'} is incomplete: it lacks {', '.join(lacking)}. Copy it again.")
    return config


def _vision_config(encoder: VisionEncoder) -> dict[str, Any]:
    if encoder.architecture is None:
        raise WlsupError(
            "This encoder was not made by build_vision: its architecture is not known, so it cannot be saved."
        )
    return {
        "architecture": asdict(encoder.architecture),
        "image": asdict(encoder.image_spec),
        "pooling": encoder.pooling,
    }


def _vision(config: dict[str, Any]) -> VisionEncoder:
    dense, base = config["dense"], config["base"]
    architecture = Architecture(dense["architecture"]["name"], dict(dense["architecture"]["kwargs"]))
    image = ImageSpec(**{**dense["image"], "mean": tuple(dense["image"]["mean"]), "std": tuple(dense["image"]["std"])})
    encoder = VisionEncoder(create_backbone(architecture), image, dense["pooling"], architecture, base["id"])
    encoder.base_sha256 = base["sha256"]
    return encoder


def _language(config: dict[str, Any], folder: Path) -> MoELanguageModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    # A base in half precision says so there; experts train in fp32, and so it was computed with.
    dense = {name: value for name, value in config["dense"].items() if name not in ("dtype", "torch_dtype")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(dense.pop("model_type"), **dense)).float()
    fuse_gelu(model)
    return MoELanguageModel(model, folder, dict(config["base"]), config.get("max_length", LanguageSpec.max_length))


def _place(layer: str) -> tuple[int, str]:
    """Block and slot of a layer: "backbone.blocks.1.mlp" -> (1, "mlp"), "mixtures.attention.3" -> (3, "attention")."""
    *_, before, last = layer.replace("_", ".").split(".")
    return (int(last), before) if last.isdigit() else (int(before), "mlp")


def _experts(names: Iterable[str]) -> dict[tuple[int, str], dict[int, dict[str, str]]]:
    """Find a file's experts: of each block and slot, of each expert, its own keys and the names in the file."""
    there: dict[tuple[int, str], dict[int, dict[str, str]]] = {}
    for name in names:
        layer, inside, rest = name.partition(".experts.")
        if inside:
            number, _, own = rest.partition(".")
            there.setdefault(_place(layer), {}).setdefault(int(number), {})[own] = name
    return there


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a tensor that is another one under a second name."""
    seen: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        seen.setdefault(key, name)
    return {name: tensors[name] for name in seen.values()}
