"""Weight files: finding, reading, writing and fingerprinting them, with errors that say what is wrong.

Nothing here knows what the tensors mean; `wlsup.models.layouts` does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = [
    "WEIGHT_SUFFIXES",
    "find_weight_file",
    "hub_folder",
    "read_json",
    "read_weights",
    "tensors_sha256",
    "write_folder",
]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

# In order of preference: a file that cannot run code comes first.
_FILE_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.pth", "model.pt")
_LFS_POINTER = b"version https://git-lfs"


def find_weight_file(folder: Path) -> Path:
    """Return the weight file of ``folder``: one of the usual names, else the only file with a weight suffix.

    Raises:
        WlsupError: when there is none, or several and none has a usual name.
    """
    for name in _FILE_NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(path.name for path in others[:5])
        raise WlsupError(f"{folder} holds several weight files ({names}); point at one of them.")
    raise WlsupError(
        f"{folder} holds no weight file: looked for {', '.join(_FILE_NAMES)} and any single "
        f"{'/'.join(WEIGHT_SUFFIXES)}. Copy the weights there, or point at the file itself."
    )


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read a weight file: safetensors, a sharded safetensors index, or a torch pickle of tensors and plain containers.

    Args:
        path: the file. A pickle is read with ``weights_only=True``: code inside it never runs.

    Returns:
        The file's mapping; torch files may nest (``{"model": {...}}``).

    Raises:
        WlsupError: the file is missing, empty, truncated, a Git LFS pointer, or holds more than tensors.
    """
    if not path.is_file():
        raise WlsupError(f"No such weight file: {path.absolute()}.")
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if head == _LFS_POINTER:
        raise WlsupError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it came from.")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WlsupError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WlsupError(f"No such file: {path.absolute()}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WlsupError(f"{path} is not readable as JSON ({error}); copy it again.") from error
    if not isinstance(value, dict):
        raise WlsupError(f"{path} holds {type(value).__name__}, not a JSON object; copy it again.")
    return value


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over sorted names, dtypes, shapes and bytes ("" if a tensor lies on the meta device)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_meta:
            return ""
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


def write_folder(folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write ``model.safetensors`` and ``config.json`` so that no half-written file is ever seen under those names.

    Args:
        folder: made if need be.
        tensors: written as given, dtype and all.
        config: anything JSON can hold.

    Returns:
        The folder.

    Raises:
        WlsupError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # safetensors refuses views that share memory; contiguous copies on the CPU never do.
        plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            save_file(plain, Path(scratch, "model.safetensors"), metadata={"format": "pt"})
            Path(scratch, "config.json").write_text(text, encoding="utf-8")
            # safetensors makes files that only their owner may read; a shared or packaged folder needs the usual mode.
            shutil.copymode(Path(scratch, "config.json"), Path(scratch, "model.safetensors"))
            for name in ("model.safetensors", "config.json"):
                with Path(scratch, name).open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(Path(scratch, name), folder / name)
    except (OSError, SafetensorError) as error:
        raise WlsupError(f"Cannot write weights to {folder}: {error}.") from error
    return folder


def hub_folder(repository: str) -> Path:
    """Return a local folder with a Hugging Face hub repository's configuration and weights, fetched if need be.

    Args:
        repository: "owner/name" or "owner/name@revision".

    Raises:
        WlsupError: it is not in the local cache and cannot be fetched; says where it looked.
    """
    from huggingface_hub import constants, snapshot_download

    name, _, revision = repository.partition("@")
    try:
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=["*.json", "model*.safetensors"])
        )
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=["pytorch_model.bin"]))
    except Exception as error:  # the hub client raises its own, httpx's and OSError's by turns
        raise WlsupError(
            f"Lacking model.safetensors and config.json of the hub repository {repository!r}: looked in the local "
            f"cache {constants.HF_HUB_CACHE} and could not fetch it ({type(error).__name__}: {_first_line(error)}). "
            f"On a machine with a network run `hf download {name} --local-dir DIR`, bring DIR here and give its path."
        ) from error
    return folder


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WlsupError(
            f"{path} is not a complete safetensors file ({_first_line(error)}): it is truncated or damaged. "
            "Copy it again."
        ) from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(read_json(index).get("weight_map", {}).values())):
        # A shard's name comes out of a file: keep it inside the folder.
        tensors.update(read_weights(index.parent / Path(name).name))
    return tensors


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        # FAIR's training checkpoints carry their command line; Namespace is a plain container.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        named = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and (named or "Unsupported" in str(error)):
            what = f" (it names {named.group(1)})" if named else ""
            raise WlsupError(
                f"{path} holds more than tensors{what}; loading it would run code from the file, so it is refused. "
                "Keep only its state dict, as safetensors, on a machine where you trust it."
            ) from error
        raise WlsupError(
            f"{path} is not a complete torch file ({_first_line(error)}): it is truncated or damaged. Copy it again."
        ) from error
    if not isinstance(content, Mapping):
        raise WlsupError(f"{path} holds {type(content).__name__}, not a state dict; save `model.state_dict()` instead.")
    return content


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
