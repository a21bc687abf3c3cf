"""``wlsup upcycle``: a dense checkpoint in, a mixture-of-experts checkpoint out, and back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlsup.cli.logs import log_to_terminal
from wlsup.cli.parser import CommandParser, given_numbers
from wlsup.errors import WlsupError, choose

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["HELP", "run"]

HELP = """\
usage: wlsup upcycle WEIGHTS OUT [options]
       wlsup upcycle MOE OUT --dense

Turn a dense model's MLPs into mixtures of experts that start as copies of them (sparse upcycling), and write an MoE
checkpoint: OUT/model.safetensors and OUT/config.json. With --dense the other way, where no expert was trained.

  WEIGHTS                       a vision encoder: mini, a timm name, hf-hub:ID, a local weight file or folder;
                                or a causal language model: mini (with --kind), a hub id, a local transformers folder
  --kind NAME                   vision | language (by default language where a folder's config.json names one)
  --experts N                   experts a layer (8)
  --k N                         experts a token (1)
  --every N | --last N | --blocks N,..
                                which blocks: the last of every N (2), the last N, or these very ones (from 0)
  --router NAME                 top_k | noisy_top_k | expert_choice | soft | hash
  --combine NAME                straight_through | renormalized | raw
  --capacity X                  times the even share of tokens that an expert takes at most (dropless)
  --noise X                     Gaussian noise on the experts, relative to each matrix's spread (0); on top of clusters
  --seed N                      of router, noise and clusters (0)
  --clusters                    experts that differ: each a low-rank part of the MLP for its own cluster of activations
  --energy X                    share of spectral energy that each expert keeps on its cluster (0.99)
  --images PATH,..              folders, tars or zips of pictures for the clusters (mini: generated ones)
  --text FILE                   a text a line for the clusters of a language model (mini: generated captions)
  --tokens N                    calibration tokens (16384)
  --allow-change                write a model that does not compute what the dense one did
  --dtype NAME                  float32 | bfloat16 | float16, on disk (the model's own)
  --dense                       give the dense model back; takes --json alone
  --json                        machine-readable, complete
"""

_DEFAULTS = {
    "experts": 8,
    "k": 1,
    "router": "top_k",
    "combine": "straight_through",
    "noise": 0.0,
    "seed": 0,
    "energy": 0.99,
    "tokens": 16384,
}
_PROBE = 4  # pictures or texts on which the upcycled model is compared with the dense one


def run(arguments: list[str]) -> int:
    """Write the checkpoint and say what it is."""
    options = _options(arguments)
    log_to_terminal(quiet=options.json)
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WlsupError(f"{out} exists already and is not an empty folder: give another one.")
    report = _back(options) if options.dense else _upcycle(options)
    if options.json:
        print(json.dumps(report, indent=2))
    elif options.dense:
        print(f"{out}: the dense {report['kind']} model, {report['parameters']:,} parameters")
    else:
        _print(report)
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser("upcycle")
    parser.add_argument("weights")
    parser.add_argument("out")
    parser.add_argument("--kind")
    for name in ("experts", "k", "every", "last", "tokens", "seed"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("capacity", "noise", "energy"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("blocks", "router", "combine", "images", "text", "dtype"):
        parser.add_argument(f"--{name}")
    for name in ("clusters", "allow-change", "dense", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(arguments)
    given_numbers(options, "experts", "k", "every", "last", "tokens")
    if options.kind is not None:
        choose("kind of model", options.kind, ("vision", "language"))
    if options.dtype is not None:
        choose("dtype", options.dtype, ("float32", "bfloat16", "float16"))
    _refuse_unread(options)
    for name, default in _DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if options.noise < 0:
        raise WlsupError(f"--noise {options.noise:g}: give 0 or a positive number.")
    return options


def _refuse_unread(options: argparse.Namespace) -> None:
    """Refuse options that were given and would do nothing, before defaults stand for the others."""
    given = [name for name, value in vars(options).items() if value is not None and value is not False]
    if options.dense and (unread := _shown(given, set(given) - {"weights", "out", "dense", "json"})):
        raise WlsupError(f"--dense gives back the MLPs that were upcycled, and takes --json alone: leave {unread} out.")
    if not options.clusters and (unread := _shown(given, {"energy", "images", "text", "tokens"})):
        raise WlsupError(f"Without --clusters nothing reads {unread}: add --clusters, or leave {unread} out.")


def _shown(given: list[str], wanted: set[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in given if name in wanted)


def _upcycle(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from wlsup.models.weights import read_weights
    from wlsup.moe.checkpoint import save_moe
    from wlsup.moe.cluster import ClusterSpec, activations, specialise
    from wlsup.moe.sites import blocks_of, choose_blocks
    from wlsup.moe.spec import MoESpec
    from wlsup.moe.upcycle import add_noise, moe_layers, upcycle

    blocks = None
    if options.blocks is not None:
        try:
            blocks = [int(number) for number in options.blocks.split(",")]
        except ValueError:
            raise WlsupError(f"--blocks {options.blocks}: give numbers with commas between, such as 1,3,5.") from None
    spec = MoESpec(
        experts=options.experts,
        router=options.router,
        k=options.k,
        combine=options.combine,
        capacity_factor=options.capacity,
        hash_seed=options.seed if options.router == "hash" else 0,
    )
    clusters = ClusterSpec(energy=options.energy, tokens=options.tokens, seed=options.seed)
    model, kind = _open(options)
    model.eval()
    chosen = choose_blocks(len(blocks_of(model)[1]), options.every, options.last, blocks)
    dense = sum(parameter.numel() for parameter in model.parameters())
    probe = _probe(model, kind, options.seed)
    wanted = _outputs(model, kind, probe)
    inputs = None
    if options.clusters:
        inputs = activations(model, chosen, _calibration(model, kind, options), options.tokens)
    noise = 0.0 if options.clusters else options.noise
    upcycle(model, chosen, spec, noise=noise, seed=options.seed, exact=not options.allow_change)
    layers = moe_layers(model)
    made_by: dict[str, Any] = {"seed": options.seed, "noise": options.noise}
    clustered: dict[str, Any] = {}
    if inputs is not None:
        clustered = {name: asdict(specialise(layers[name], inputs[name], clusters)) for name in layers}
        # Clusters are made of the dense MLP, so that noise before them would be lost.
        add_noise((expert for layer in layers.values() for expert in layer.experts), options.noise, options.seed)
        made_by["clusters"] = asdict(clusters)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    folder = save_moe(model, options.out, dtype, made_by)
    if dtype is not None:  # the error is the file's: with what rounding it did to the weights
        model.load_state_dict(dict(read_weights(folder / "model.safetensors")), strict=False)
    error = float((_outputs(model, kind, probe) - wanted).norm() / wanted.norm())
    experts = sum(p.numel() for layer in layers.values() for p in layer.experts.parameters())
    idle = experts // spec.experts * (spec.experts - min(spec.k, spec.experts))
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        "weights": options.weights,
        "out": str(folder),
        "kind": kind,
        "layers": list(layers),
        "experts": spec.experts,
        "k": spec.k,
        "parameters": {"dense": dense, "moe": total, "active": total - idle},
        "relative_error": error,
        "clusters": clustered,
    }


def _back(options: argparse.Namespace) -> dict[str, Any]:
    from wlsup.models.language import LanguageModel
    from wlsup.moe.checkpoint import load_moe, save_dense

    model = load_moe(options.weights)
    folder = save_dense(model, options.out)
    return {
        "weights": options.weights,
        "out": str(folder),
        "kind": "language" if isinstance(model, LanguageModel) else "vision",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _open(options: argparse.Namespace) -> tuple[nn.Module, str]:
    kind = options.kind or _kind(options.weights)
    if kind == "language":
        from wlsup.models.language import LanguageModel, LanguageSpec

        return LanguageModel(LanguageSpec(weights=options.weights)), kind
    from wlsup.models.vision import VisionSpec, build_vision

    return build_vision(VisionSpec(weights=options.weights)), kind


def _kind(weights: str) -> str:
    """Say what a folder's config.json says; anything else is a vision encoder's name.

    Raises:
        WlsupError: an MoE checkpoint, or a language model of another family.
    """
    path = Path(weights).expanduser() / "config.json"
    if not path.is_file():
        return "vision"
    from wlsup.models.language import FAMILIES
    from wlsup.models.weights import read_json
    from wlsup.moe.checkpoint import FORMAT

    config = read_json(path)
    if config.get("format") == FORMAT:
        raise WlsupError(f"{weights} is upcycled already. Give a dense model, or get it back with --dense.")
    family = config.get("model_type")
    if family not in FAMILIES and any("CausalLM" in str(name) for name in config.get("architectures") or ()):
        raise WlsupError(
            f"{weights} is a language model of the family {family!r}, which is not known here. Those that are: "
            f"{', '.join(FAMILIES)}."
        )
    return "language" if family in FAMILIES else "vision"


def _probe(model: nn.Module, kind: str, seed: int) -> Tensor:
    """Noise pictures or random ids: what an exact copy is exact on as on anything."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    if kind == "vision":
        side = model.image_spec.size
        return torch.randn(_PROBE, 3, side, side, generator=generator)
    length = min(16, model.positions)
    return torch.randint(model.vocabulary, (_PROBE, length), generator=generator)


def _outputs(model: nn.Module, kind: str, probe: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        if kind == "vision":
            return model(probe).tokens
        return model.model(input_ids=probe, use_cache=False).logits.float()


def _calibration(model: nn.Module, kind: str, options: argparse.Namespace) -> Iterator[Any]:
    if kind == "language":
        if options.images:
            raise WlsupError("--images are for vision encoders; a language model's clusters take --text FILE.")
        return _texts(model, options)
    if options.text:
        raise WlsupError("--text is for language models; a vision encoder's clusters take --images PATH,...")
    return _pictures(model, options)


def _texts(model: nn.Module, options: argparse.Namespace) -> Iterator[Any]:
    if options.text:
        path = Path(options.text).expanduser()
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise WlsupError(f"--text {path} is not readable as UTF-8 text ({error}).") from error
        texts = [line for line in lines if line]
    elif options.weights == "mini":
        from wlsup.data.mini import mini_captions

        texts = [captions[0] for captions in mini_captions("pretrain", 1024, options.seed).captions]
    else:
        raise WlsupError("Clusters need texts of the kind that the model is for: give --text FILE, a text a line.")
    for start in range(0, len(texts), 64):
        tokens = model.tokenizer(texts[start : start + 64])
        yield tokens.ids, tokens.mask


def _pictures(model: nn.Module, options: argparse.Namespace) -> Iterator[Tensor]:
    from wlsup.data.dataset import PictureDataset
    from wlsup.data.loader import Failure
    from wlsup.data.sources import MemoryPictures, StoredPictures
    from wlsup.data.stores import JoinedStore, open_store
    from wlsup.data.subset import split_by_hash
    from wlsup.data.transforms import EvalTransform

    spec = model.image_spec
    rows, columns = model.grid_size
    wanted = -(-options.tokens // (rows * columns))
    if options.images:
        store = JoinedStore([open_store(path, "--images") for path in options.images.split(",")])
        names = store.names()
        keys, _ = split_by_hash(names, min(wanted, len(names)), 0)
        pictures: Any = StoredPictures(store, keys)
    elif options.weights == "mini":
        from wlsup.data.mini import pretraining_pictures

        pictures = MemoryPictures(pretraining_pictures(wanted, options.seed))
        keys = [str(index) for index in range(wanted)]
    else:
        raise WlsupError("Clusters need pictures of the kind that the encoder is for: give --images PATH,...")
    data = PictureDataset(keys, pictures, EvalTransform(spec), spec)
    for start in range(0, len(keys), 64):
        batch = data.__getitems__(list(range(start, min(start + 64, len(keys)))))
        if isinstance(batch, Failure):
            raise WlsupError(batch.message)
        if len(batch):
            yield batch.images


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    count = report["parameters"]
    table = Table(title=f"{report['weights']} -> {report['out']}", title_justify="left")
    for column in ("layer", "experts", "a token", *(("shares, %", "rank", "error") if report["clusters"] else ())):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name in report["layers"]:
        row = [name, str(report["experts"]), str(report["k"])]
        if made := report["clusters"].get(name):
            ranks = [rank for of_map in made["ranks"].values() for rank in of_map]
            shares = " ".join(f"{100 * share:.0f}" for share in made["shares"])
            row += [shares, f"{min(ranks)}-{max(ranks)}", f"{made['error']:.1e}"]
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(
        f"parameters: {count['dense']:,} dense, {count['moe']:,} in all, {count['active']:,} active a token\n"
        f"relative error against the dense model: {report['relative_error']:.1e}",
        highlight=False,
    )
