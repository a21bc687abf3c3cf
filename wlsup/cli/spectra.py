"""``wlsup spectra``: the spectra of a run's weights, before and after, or of any weights, by WeightWatcher."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlsup.cli.earlier import left_as_it_is
from wlsup.cli.logs import log_to_terminal
from wlsup.cli.parser import CommandParser
from wlsup.cli.recipes import holds_run
from wlsup.errors import WlsupError

if TYPE_CHECKING:
    from torch import nn

    from wlsup.evaluation.spectra import LayerSpectrum, SpectraSpec
    from wlsup.evaluation.weight_views import LeftOut, WeightView

__all__ = ["HELP", "run"]

_log = logging.getLogger("wlsup")

HELP = """\
usage: wlsup spectra RUN|WEIGHTS [options]

WeightWatcher's figures, layer by layer: alpha of the spectrum's power law, D and tail of the fit, alpha-weighted, log
norm, distance to the same matrix shuffled. A layer without a power law is said to have none.

  RUN|WEIGHTS                   a run's folder (before and after training, and along it where it kept checkpoints);
                                or mini, a timm name, hf-hub:ID, a local weight file or folder, of a vision encoder or
                                of a causal language model
  --layers GLOB                 such as 'blocks.*.mlp.*', 'adapter.*' or '*'; of a run by default the encoder's layers
                                and all that train
  --min-evals N                 eigenvalues that a fit needs (50)
  --max-distance D              a fit of larger Kolmogorov-Smirnov distance is no power law (0.1)
  --no-randomize                without the distance to shuffled matrices, which take most of the time
  --spikes                      also count eigenvalues beyond the Marchenko-Pastur bulk: seconds a layer
  --random                      also random matrices of the same shapes, to see what no learning looks like
  --fused                       q, k, v of one weight as one matrix, as weightwatcher itself takes them
  --seed N                      of random orders and matrices (0)
  --out DIR                     where spectra.json, spectra.png and spectra/ go; a run's go into its folder, others
                                nowhere by default
  --no-figures                  spectra.json without pictures
  --json                        print spectra.json instead of the table
"""


def run(arguments: list[str]) -> int:
    """Analyse, print, and write where there is somewhere to write to."""
    parser = CommandParser("spectra")
    parser.add_argument("target")
    parser.add_argument("--layers")
    parser.add_argument("--min-evals", type=int, default=50)
    parser.add_argument("--max-distance", type=float, default=0.1)
    parser.add_argument("--randomize", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--spikes", action="store_true")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    log_to_terminal(quiet=options.json)
    import torch  # noqa: F401, before what weightwatcher brings

    from wlsup.evaluation.spectra import SpectraSpec, spectra_report
    from wlsup.evaluation.spectra_files import write_spectra
    from wlsup.evaluation.spectra_table import print_spectra

    spec = SpectraSpec(
        min_evals=options.min_evals,
        max_distance=options.max_distance,
        randomize=options.randomize,
        spikes=options.spikes,
        seed=options.seed,
    )
    folder = Path(options.target)
    is_run = holds_run(folder)
    if (folder / "adapter_config.json").is_file():
        raise WlsupError(f"{folder} holds an adapter alone, whose spectra are in its run's: give the run's folder.")
    if not is_run and any((folder / name).is_file() for name in ("config.yaml", "results.json")):
        raise WlsupError(
            f"{folder} is a run that keeps no weights: it lacks config.yaml or checkpoints/last.ckpt. Give a finished "
            "run's folder, as `wlsup fit` named it."
        )
    analysis = _of_run(folder, options, spec) if is_run else _of_weights(options, spec)
    report = spectra_report(analysis.views, analysis.columns, analysis.left_out, spec, options.fused)
    if analysis.along:
        report["along"] = analysis.along
    out = options.out or (folder if is_run else None)
    looked_at = {"layers": [layer["name"] for layer in report["layers"]]}
    if is_run and options.out is None and (stays := left_as_it_is(folder / "spectra.json", looked_at)):
        _log.warning("%s", stays)
        out = None
    if out is not None:
        from wlsup.callbacks.progress import progress

        title = f"{analysis.name}: alpha by depth"
        if options.no_figures:
            write_spectra(out, report, analysis.columns, figures=False)
        else:
            with progress("pictures of spectra") as show:
                write_spectra(out, report, analysis.columns, title=title, progress=show)
    if options.json:
        print(json.dumps(report, indent=2, allow_nan=False))
        return 0
    print_spectra(report, f"Spectra of {analysis.title}")
    if out is not None:
        print(f"written to {out / 'spectra.json'}" + ("" if options.no_figures else f", {out / 'spectra'}/"))
    return 0


class _Analysis:
    """What was looked at and found."""

    def __init__(self, name: str, title: str, views: Sequence[WeightView], left_out: Sequence[LeftOut]) -> None:
        self.name, self.title, self.views, self.left_out = name, title, views, left_out
        self.columns: dict[str, dict[str, LayerSpectrum]] = {}
        self.along: list[dict[str, Any]] = []


def _of_run(folder: Path, options: argparse.Namespace, spec: SpectraSpec) -> _Analysis:
    import torch

    from wlsup.callbacks.spectra import chosen_views, had_before
    from wlsup.cli.configuration import load_run, untrained_run
    from wlsup.evaluation.spectra import protocol
    from wlsup.evaluation.spectra_files import earlier_along
    from wlsup.evaluation.weight_views import weight_views

    model, _ = load_run(folder)
    views, left_out = chosen_views(model, options.layers, fused=options.fused)
    analysis = _Analysis(model.name, f"{model.name}, {folder}", views, left_out)
    pretrained = {view.name: view for view in weight_views(untrained_run(folder), fused=options.fused)[0]}
    before = [pretrained[view.name] for view in had_before(model, views)]
    analysis.columns["before"] = _analyse(before, spec, "spectra before training")
    # what did not train is what it was
    same = {
        view.name for view in views if view.name in analysis.columns["before"]
        and torch.equal(view.matrix(), pretrained[view.name].matrix())
    }  # fmt: skip
    found = _analyse([view for view in views if view.name not in same], spec, "spectra after training")
    known = found | {name: analysis.columns["before"][name] for name in same}
    analysis.columns["after"] = {view.name: known[view.name] for view in views}
    if options.random:
        analysis.columns["random"] = _random(views, spec)
    analysis.along = _along(folder, model, views, same, analysis, spec)
    analysis.along = analysis.along or earlier_along(folder, protocol(spec, options.fused))
    return analysis


def _along(
    folder: Path,
    model: nn.Module,
    views: Sequence[WeightView],
    same: set[str],
    analysis: _Analysis,
    spec: SpectraSpec,
) -> list[dict[str, Any]]:
    """Analyse the run's other checkpoints, in the order of training; the model holds the last of them after."""
    from dataclasses import replace

    from wlsup.callbacks.spectra import along_entry
    from wlsup.cli.configuration import read_checkpoint

    others = [path for path in (folder / "checkpoints").glob("*.ckpt") if path.stem not in ("last", "previous")]
    checkpoints = sorted(((read_checkpoint(path), path) for path in others), key=lambda pair: pair[0]["global_step"])
    entries = []
    for checkpoint, path in checkpoints:
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"], strict=False)
        moving = [view for view in views if view.name not in same]
        found = _analyse(moving, replace(spec, randomize=False, spikes=False), f"spectra of {path.name}")
        known = found | {name: analysis.columns["before"][name] for name in same}
        entries.append(
            along_entry(checkpoint["global_step"], checkpoint["epoch"] + 1, {v.name: known[v.name] for v in views})
        )
    return entries


def _of_weights(options: argparse.Namespace, spec: SpectraSpec) -> _Analysis:
    from wlsup.callbacks.spectra import matching
    from wlsup.evaluation.weight_views import weight_views

    model = _load(options.target)
    views, left_out = weight_views(model, fused=options.fused)
    if options.layers is not None:
        views = matching(views, options.layers)
    analysis = _Analysis(Path(options.target).name, options.target, views, left_out)
    analysis.columns["after"] = _analyse(views, spec, "spectra")
    if options.random:
        analysis.columns["random"] = _random(views, spec)
    return analysis


def _load(weights: str) -> nn.Module:
    """Return a vision encoder's backbone, or the causal language model of a local folder of transformers'."""
    from wlsup.models.language import FAMILIES, LanguageModel, LanguageSpec
    from wlsup.models.vision import VisionSpec, build_vision

    config = Path(weights) / "config.json"
    if config.is_file():
        try:
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise WlsupError(f"{config} is not a model's configuration: it is no JSON object.") from error
        if kind in FAMILIES:
            return LanguageModel(LanguageSpec(weights=weights))
    return build_vision(VisionSpec(weights=weights)).backbone


def _random(views: Sequence[WeightView], spec: SpectraSpec) -> dict[str, LayerSpectrum]:
    from wlsup.evaluation.spectra import random_like

    return _analyse([random_like(view, spec.seed) for view in views], spec, "spectra of random matrices")


def _analyse(views: Sequence[WeightView], spec: SpectraSpec, what: str) -> dict[str, LayerSpectrum]:
    from wlsup.callbacks.progress import progress
    from wlsup.evaluation.spectra import spectra

    with progress(what) as show:
        return spectra(views, spec, show)
