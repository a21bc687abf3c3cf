"""``wlsup caption``: put any picture into words with a finished run's captioner."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from wlsup.approaches import APPROACHES, approach_class
from wlsup.cli.logs import log_to_terminal
from wlsup.cli.parser import CommandParser
from wlsup.cli.recipes import approach_named_in
from wlsup.errors import WlsupError

__all__ = ["HELP", "run"]

HELP = """\
usage: wlsup caption RUN IMAGE [IMAGE ...] [options]

Caption pictures with what a run has trained.

  RUN                           folder of a finished run whose approach captions: mae_lm, linear_map, magma, ...
  IMAGE                         picture files, or folders of them: of a folder, what cannot be read is left out
  --method NAME                 greedy | beam | nucleus; how words are chosen (by default the run's own way)
  --beams N                     of beam search
  --top-p X                     of nucleus sampling, in (0, 1]
  --temperature X               of nucleus sampling
  --seed N                      of nucleus sampling; the same seed and pictures give the same captions
  --max-tokens N                longest caption, in tokens
  --batch-size N                pictures a forward pass (32)
  --json                        machine-readable, complete
"""

_GENERATION = ("method", "max_tokens", "beams", "top_p", "temperature", "seed")

_log = logging.getLogger("wlsup")


def run(arguments: list[str]) -> int:
    """Print a caption a picture."""
    parser = CommandParser("caption")
    parser.add_argument("run")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--method")
    parser.add_argument("--beams", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise WlsupError(f"--batch-size {options.batch_size}: give a positive number.")
    folder = Path(options.run)
    name = _captioning_approach(folder)
    files = _files(options.images)
    log_to_terminal(quiet=True)
    from wlsup.cli.configuration import load_run

    model, _ = load_run(folder)
    generation = _generation(model, options)
    skipped: dict[str, str] = {}
    captions = []
    for path, caption in _captions(model, files, generation, options.batch_size, skipped):
        captions.append({"image": _shown(path), "caption": caption})
        if not options.json:
            print(f"{_shown(path)}: {caption}", flush=True)
    if not captions:
        raise WlsupError(f"None of the {len(skipped)} pictures can be read: {_some(skipped)}.")
    for path, reason in skipped.items():
        _log.warning("left out %s: %s", path, reason)
    if options.json:
        spoken = None if generation is None else asdict(generation)
        result = {"run": str(folder), "approach": name, "generation": spoken, "captions": captions, "skipped": skipped}
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


def _captioning_approach(folder: Path) -> str:
    """Return the approach of a finished run that captions.

    Raises:
        WlsupError: there is no such run, it is not finished, or its approach does not caption.
    """
    for what in ("config.yaml", "checkpoints/last.ckpt"):
        if not (folder / what).is_file():
            raise WlsupError(
                f"No finished run in {folder}: it has no {what}. Give the folder that `wlsup fit` named, such as "
                "runs/mae_lm/mini/seed0/<time>."
            )
    name = approach_named_in(["-c", str(folder / "config.yaml")])
    if not hasattr(approach_class(name), "caption"):
        able = ", ".join(other for other in APPROACHES if hasattr(approach_class(other), "caption"))
        raise WlsupError(f"Approach {name!r} of {folder} does not caption. Those that do: {able}.")
    return name


def _files(given: list[str]) -> list[tuple[Path, bool]]:
    """Return the pictures, and whether each was named itself, not found in a folder.

    Raises:
        WlsupError: a path that leads nowhere, or a folder without a picture.
    """
    from wlsup.data.images import is_picture

    files = []
    for path in map(Path, given):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if is_picture(file.name) and file.is_file())
            if not found:
                raise WlsupError(f"No picture in {path} or the folders below it.")
            files += [(file, False) for file in found]
        elif path.is_file():
            files.append((path, True))
        else:
            raise WlsupError(f"No picture {path} (looked in {Path.cwd()}). Give picture files, or folders of them.")
    return files


def _generation(model: Any, options: argparse.Namespace) -> Any:
    """Return the run's way of choosing words with what was asked for in its place; None where it has one way only.

    Raises:
        WlsupError: options that this captioner has no use for, or out of range.
    """
    chosen = {name: value for name in _GENERATION if (value := getattr(options, name)) is not None}
    if getattr(model, "language", None) is None:
        if chosen:
            raise WlsupError(
                f"{', '.join('--' + name.replace('_', '-') for name in chosen)}: this run's captioner is a decoder of "
                "its own, which always takes the likeliest words. Leave the option out."
            )
        return None
    own, asked = model.generation, chosen.get("method", model.generation.method)
    needed = {"beams": "beam", "top_p": "nucleus", "temperature": "nucleus", "seed": "nucleus"}
    for name, method in needed.items():
        if name in chosen and asked != method:
            raise WlsupError(
                f"--{name.replace('_', '-')} is of --method {method}; captions would be chosen by {asked}."
            )
    # of another method than the run's own, what the run says of its own method has no use
    return replace(own if asked == own.method else type(own)(max_tokens=own.max_tokens), **chosen)


def _captions(
    model: Any, files: list[tuple[Path, bool]], generation: Any, batch_size: int, skipped: dict[str, str]
) -> Iterator[tuple[Path, str]]:
    """Yield path and caption, a batch at a time, and note what was left out.

    Raises:
        WlsupError: a picture that was named itself cannot be read.
    """
    import torch

    from wlsup.data.images import UnreadableImage, read_rgb
    from wlsup.data.transforms import EvalTransform, normalize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    transform = EvalTransform(model.image_spec)
    for start in range(0, len(files), batch_size):
        paths, views = [], []
        for path, named in files[start : start + batch_size]:
            try:
                views.append(transform(read_rgb(path)))
                paths.append(path)
            except UnreadableImage as error:
                if named:
                    raise WlsupError(f"{_shown(path)} cannot be read: {error.reason}. Give another picture.") from error
                skipped[_shown(path)] = error.reason
        if views:
            images = normalize(views, model.image_spec).to(device)
            yield from zip(paths, model.caption(images, generation), strict=True)


def _shown(path: Path) -> str:
    """Return a path that can be printed, also of a name that is no valid text."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _some(skipped: dict[str, str]) -> str:
    shown = [f"{path} ({reason})" for path, reason in list(skipped.items())[:3]]
    return "; ".join(shown) + ("; ..." if len(skipped) > 3 else "")
