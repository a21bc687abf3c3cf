"""``wlsup export``: a run's encoder, its adapter alone, or its language model, in a folder that says what it is."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlsup.cli.logs import log_to_terminal
from wlsup.cli.parser import CommandParser
from wlsup.cli.wise_ft import check_finished, numbers
from wlsup.errors import WlsupError

if TYPE_CHECKING:
    import lightning

    from wlsup.approaches.base import Approach

__all__ = ["ADAPTER_CONFIG", "HELP", "load_adapter", "run"]

HELP = """\
usage: wlsup export RUN [options]

Write the encoder that a run has trained, in a folder with a model card (README.md):
  model.safetensors, config.json   a plain ViT, the adapter folded in where that can be: timm loads it in three lines
  encoder.pt2                      where it cannot: a program that torch loads in three lines
  adapter_model.safetensors        with --adapter-only: what trained, and on which base model it stands
  model.safetensors, config.json   with --language: an MoE checkpoint (no card), the trained experts in the MLPs' places

  RUN                           a finished run's folder
  --alpha A|chosen              WiSE-FT: (1 - A) pretrained + A fine-tuned; chosen: what `wlsup wise-ft` chose (1)
  --adapter-only                only what trained
  --language                    the language model of a run of magma_moe with mixture: ffn
  -o, --out DIR                 a new or empty folder (RUN/export, RUN/export-alpha0.5, RUN/export-adapter, ...)
  --licence NAME                for the model card, such as cc-by-4.0 (the card says `other` without it)
  --json                        machine-readable: what was written
"""

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FORMAT = "wlsup-adapter"


def run(arguments: list[str]) -> int:
    """Write the folder and say what it is."""
    parser = CommandParser("export")
    parser.add_argument("run")
    parser.add_argument("--alpha", default="1")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--adapter-only", dest="form", action="store_const", const="adapter", default="encoder")
    form.add_argument("--language", dest="form", action="store_const", const="language")
    parser.add_argument("-o", "--out")
    parser.add_argument("--licence", "--license", default="other")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", options.licence):
        raise WlsupError(f"--licence {options.licence!r}: give an identifier such as mit, apache-2.0 or cc-by-4.0.")
    if options.form == "language" and options.licence != "other":
        raise WlsupError("--licence is for the model card, which --language does not write: leave it out.")
    folder = Path(options.run)
    check_finished(folder)
    alpha = _alpha(folder, options.alpha)
    out = Path(options.out) if options.out else folder / _name(alpha, options.form)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WlsupError(f"{out} is there already. Give a new or empty folder with --out, or remove it.")
    log_to_terminal(quiet=True)
    written = _export(folder, out, alpha, options)
    if options.json:
        print(json.dumps(written, indent=2))
        return 0
    from wlsup.cli.model_card import loading_lines

    print(f"wrote {out}: {', '.join(written['files'])}")
    print(written["what"])
    print("\n".join(f"    {line}" for line in loading_lines(written["kind"], str(out))))
    if alpha == 0:
        print("alpha 0: these are the weights from before training. What was taught is not in them.")
    return 0


def load_adapter(folder: Path) -> tuple[Approach, lightning.LightningDataModule]:
    """Return the approach that an ``--adapter-only`` folder holds, on its base model, and its run's data module.

    Raises:
        WlsupError: a file is lacking or damaged, or the base model here is another one.
    """
    from wlsup.approaches import approach_class
    from wlsup.cli.configuration import configure
    from wlsup.data.datamodule import CaptionDataModule
    from wlsup.evaluation.wise_ft_curve import load_tensors
    from wlsup.models.weights import read_json, read_weights, tensors_sha256

    said = read_json(folder / ADAPTER_CONFIG)
    if said.get("format") != _ADAPTER_FORMAT:
        raise WlsupError(f"{folder / ADAPTER_CONFIG} is not of wlsup: its format is {said.get('format')!r}.")
    tensors = read_weights(folder / "adapter_model.safetensors")
    if tensors_sha256(tensors) != said["sha256"]:
        raise WlsupError(f"{folder} is damaged: adapter_model.safetensors is not what {ADAPTER_CONFIG} describes.")
    arguments = ["-c", str(folder / "config.yaml")]
    cli = configure(approach_class(said["approach"]), CaptionDataModule, arguments, "export", build=False)
    for role, base in cli.model.bases.items():
        if said["bases"].get(role, {}).get("sha256") != base["sha256"]:
            raise WlsupError(
                f"This adapter stands on another {role}: {said['bases'].get(role, {}).get('id')}, not {base['id']}. "
                "Give the same base weights in its config.yaml."
            )
    load_tensors(cli.model, tensors)
    return cli.model.eval(), cli.datamodule


def _alpha(folder: Path, text: str) -> float:
    """Return the alpha that was asked for.

    Raises:
        WlsupError: it is none, or nothing has been chosen yet.
    """
    if text == "chosen":
        from wlsup.models.weights import read_json

        path = folder / "wise_ft.json"
        if not path.is_file():
            raise WlsupError(f"No alpha has been chosen for {folder}: run `wlsup wise-ft {folder}` first.")
        chosen = read_json(path).get("chosen_alpha")
        if not isinstance(chosen, int | float) or not 0 <= chosen <= 1:
            raise WlsupError(f"{path} does not say which alpha was chosen: run `wlsup wise-ft {folder}` again.")
        return float(chosen)
    values = numbers(text, "--alpha")
    if len(values) != 1 or not 0 <= values[0] <= 1:
        raise WlsupError(f"--alpha {text}: give a number in [0, 1], 1 being the fine-tuned encoder, or `chosen`.")
    return values[0]


def _name(alpha: float, form: str) -> str:
    return "export" + ("" if alpha == 1 else f"-alpha{alpha:g}") + ("" if form == "encoder" else f"-{form}")


def _export(folder: Path, out: Path, alpha: float, options: argparse.Namespace) -> dict[str, Any]:
    from wlsup.callbacks.wise_ft import refuse_no_line
    from wlsup.cli.configuration import load_run
    from wlsup.evaluation.wise_ft import interpolate
    from wlsup.evaluation.wise_ft_curve import load_tensors

    module, _ = load_run(folder)
    if alpha != 1 and not module.identity_at_start:
        refuse_no_line(module)
    if module.untouched and alpha != 1 and options.form != "encoder":
        raise WlsupError(
            f"Approach {module.name!r} leaves the encoder as it was pretrained: WiSE-FT's line, and so --alpha, is of "
            "an encoder that trains. Leave --alpha out."
        )
    if module.untouched and options.form == "encoder":
        raise WlsupError(
            f"Approach {module.name!r} leaves the encoder as it was pretrained ({module.encoder.base_id}), so that "
            "there is no encoder to export; --adapter-only writes what it trained beside it."
        )
    if alpha != 1:
        if not module.start.check(module):
            print(
                "warning: this run's checkpoint does not say where training started (it is of an older version), so "
                f"alpha {alpha:g} is taken from the start that its configuration and seed make here, unchecked.",
                file=sys.stderr,
            )
        state = module.state_dict()
        end = {name: state[name].detach().clone() for name in module.start.tensors}
        load_tensors(module, interpolate(module.start.tensors, end, alpha, module.start.held))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            # Under its last name already, since the model card says it; moved when it is whole.
            place = Path(scratch) / out.name
            place.mkdir()
            written = _write(module, folder, place, alpha, options)
            if out.is_dir():
                out.rmdir()
            os.replace(place, out)
    except OSError as error:
        raise WlsupError(f"Cannot write {out}: {error.strerror}. Give another folder with --out.") from error
    return {"folder": str(out), **written}


def _write(module: Approach, folder: Path, place: Path, alpha: float, options: argparse.Namespace) -> dict[str, Any]:
    """Write all files; return what they are."""
    from wlsup.cli.model_card import model_card
    from wlsup.files import write_json, write_text
    from wlsup.models.weights import read_json

    if options.form == "language":
        return _write_language(module, place, alpha)
    # Read first: what is damaged is told before anything is written.
    results = read_json(folder / "results.json") if (folder / "results.json").is_file() else {}
    curve = read_json(folder / "wise_ft.json") if alpha != 1 and (folder / "wise_ft.json").is_file() else {}
    if options.form == "adapter":
        kind, what = "adapter", _write_adapter(module, folder, place, alpha)
        difference = None
    else:
        kind, what, difference = _write_encoder(module, place)
    said = {
        "kind": kind,
        "what": what,
        "approach": module.name,
        "alpha": alpha,
        "bases": module.bases,
        "image": asdict(module.image_spec),
        "width": module.encoder.embed_dim,
        "max_difference": difference,
    }
    if kind == "program":
        write_json(place / "config.json", {"format": "wlsup-program", **said})
    card = model_card(said, place.name, results, curve, options.licence)
    write_text(place / "README.md", card)
    return {**said, "files": sorted(path.name for path in place.iterdir())}


def _write_adapter(module: Approach, folder: Path, place: Path, alpha: float) -> str:
    from safetensors.torch import save_file

    from wlsup.files import write_json
    from wlsup.models.weights import tensors_sha256

    state = module.state_dict()
    tensors = {name: state[name].detach().cpu().clone().contiguous() for name in module.start.tensors}
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(folder / "config.yaml", place / "config.yaml")
    config = {
        "format": _ADAPTER_FORMAT,
        "version": 1,
        "approach": module.name,
        "alpha": alpha,
        "bases": module.bases,
        "image": asdict(module.image_spec),
        "sha256": tensors_sha256(tensors),
    }
    write_json(place / ADAPTER_CONFIG, config)
    return f"what trained, {len(tensors)} tensors, for wlsup on the base model {module.encoder.base_id}"


def _write_language(module: Approach, place: Path, alpha: float) -> dict[str, Any]:
    """Write the language model with its experts in the MLPs' places; return what it is.

    Raises:
        WlsupError: the run has no such experts.
    """
    from wlsup.moe.checkpoint import save_moe
    from wlsup.moe.upcycle import UpcycledMLPs

    mixtures = getattr(module, "mixtures", None)
    if not isinstance(mixtures, UpcycledMLPs):
        raise WlsupError(
            f"--language is for runs of magma_moe with mixture: ffn; this run of {module.name!r} has no experts in the "
            "places of a language model's MLPs. --adapter-only writes what it trained."
        )
    mixtures.detach()
    mixtures.replace(module.language)
    save_moe(module.language, place, made_by={"approach": module.name, "alpha": alpha})
    return {
        "kind": "language",
        "what": f"an MoE checkpoint of the language model {module.language.base['id']}",
        "approach": module.name,
        "alpha": alpha,
        "bases": module.bases,
        "files": sorted(path.name for path in place.iterdir()),
    }


def _write_encoder(module: Approach, place: Path) -> tuple[str, str, float]:
    """Write the encoder in the plainest form that computes what it does; return kind, description and difference."""
    from wlsup.approaches.plain import encoder_adapters, plain_encoder
    from wlsup.models.export import TOLERANCE, difference_of, write_program, write_timm

    plain = plain_encoder(module)
    if plain is not None and (apart := difference_of(module.encoder, plain.features)) <= TOLERANCE:
        difference = write_timm(plain, place)
        if difference is not None:
            folded = bool(encoder_adapters(module)) or hasattr(module, "merged")
            what = "a plain ViT for timm" + (", the adapter folded into its weights" if folded else "")
            return "timm", what, max(difference, apart)
        return "program", "a torch.export program", write_program(plain, [], place)
    adapters = encoder_adapters(module)
    what = f"a torch.export program with its {module.name} modules at work, which no plain ViT can hold"
    return "program", what, write_program(module.encoder, adapters, place)
