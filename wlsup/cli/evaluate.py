"""``wlsup evaluate``: judge a run's encoder, pretrained and fine-tuned, or any encoder, by more than k-NN."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wlsup.cli.earlier import left_as_it_is
from wlsup.cli.export import ADAPTER_CONFIG, load_adapter
from wlsup.cli.logs import log_to_terminal
from wlsup.cli.parser import CommandParser, given_numbers
from wlsup.cli.recipes import eval_sets_named, holds_run, knn_options
from wlsup.errors import WlsupError

__all__ = ["HELP", "run"]

HELP = """\
usage: wlsup evaluate RUN|WEIGHTS [options]

Compare a run's fine-tuned encoder with the pretrained one by more than k-NN, set by set, with 95 % intervals; writes
evaluation.json and pictures of the classes that changed most (classes/) into the run's folder; a choice of --metrics,
--sets or --shots does so only if it loses nothing that the run's file has. Of weights alone the figures are printed.

  RUN|WEIGHTS                   a run's folder; or what `wlsup export` made of one, mini, any timm name (not ViTs
                                alone), hf-hub:ID, a local weight file or folder
  --metrics NAME,..             probe, few_shot, calibration, drift, classes, zero_shot, retrieval (all by default)
  --sets NAME,..|FILE.yaml      eval sets, or those of a recipe (data: {eval_sets: [...]}), your own among them; by
                                default the run's own, or the four mini ones
  --root DIR                    the folder of the published sets (by default the run's; the environment's
                                WLSUP_DATA; ./data)
  --shots N,..                  of few_shot: labelled pictures a class (1,5)
  --draws N                     of few_shot: how often they are drawn (20)
  --templates FILE              of zero_shot: a text file of templates in place of the package's
  --resamples N                 of the test pictures, for intervals (2000)
  --batch-size N                pictures a forward pass (256)
  --workers N                   processes that read pictures (0)
  --out DIR                     where to write in any case, in place of the run's folder; weights' figures too
  --json                        machine-readable, complete
"""

_log = logging.getLogger("wlsup")


def run(arguments: list[str]) -> int:
    """Print the comparison, and write it where there is somewhere to write to."""
    parser = CommandParser("evaluate")
    parser.add_argument("target")
    parser.add_argument("--metrics")
    parser.add_argument("--sets")
    parser.add_argument("--root")
    parser.add_argument("--shots")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--templates", type=Path)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    given_numbers(options, "batch_size", "workers", "draws", "resamples")
    folder = Path(options.target)
    is_run = holds_run(folder)
    spec = _spec(options)
    log_to_terminal(quiet=options.json)
    if is_run:
        results, out = _evaluate_run(folder, spec, options)
    else:
        results, out = _evaluate_weights(spec, options), options.out
    if out is not None:
        from wlsup.files import write_json

        with _writing(out):
            write_json(out / "evaluation.json", results)
    if options.json:
        print(json.dumps({"target": options.target, **results}, indent=2, allow_nan=False))
        return 0
    from wlsup.evaluation.evaluation_table import print_evaluation

    print_evaluation(results, f"More than k-NN: {options.target}")
    if out is not None:
        print(f"In {out}: evaluation.json{', classes/' if (out / 'classes').is_dir() else ''}")
    return 0


def _spec(options: argparse.Namespace) -> Any:
    from wlsup.evaluation.judgement import METRICS, MetricSpec
    from wlsup.evaluation.zero_shot import read_prompts

    chosen = METRICS if options.metrics is None else tuple(name.strip() for name in options.metrics.split(","))
    try:
        shots = (1, 5) if options.shots is None else tuple(int(number) for number in options.shots.split(","))
    except ValueError:
        raise WlsupError(f"--shots {options.shots}: give numbers, such as 1,5.") from None
    if options.templates is not None:
        read_prompts("", options.templates)
    return MetricSpec(chosen, shots, options.draws, options.resamples)


def _evaluate_run(folder: Path, spec: Any, options: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """Return the figures, and the folder for them; None where the run's own file stays."""
    from wlsup.callbacks.evaluation import save_examples, score_retrieval, score_zero_shot
    from wlsup.cli.configuration import choose_eval_sets, load_run, pretrained_run
    from wlsup.evaluation.judgement import compare, protocols, shots_of
    from wlsup.evaluation.zero_shot import read_prompts

    module, data = load_run(folder)
    choose_eval_sets(data, options.sets, options.root)
    data.image_spec = module.image_spec
    data.cache_features = False  # the held-out pairs are embedded whole
    if "retrieval" in spec:
        data.setup()  # captions that are not here are missed now, not after hours
    eval_sets = data.eval_datasets()
    out = _out(folder, spec, [one.name for one in eval_sets], options)
    pretrained = pretrained_run(folder)
    vote = knn_options(folder)
    before = {one.name: _judge(pretrained, one, spec, options, vote) for one in eval_sets}
    del pretrained
    sets: dict[str, Any] = {}
    for one in eval_sets:
        after = _judge(module, one, spec, options, vote)
        sets[one.name] = compare(before[one.name], after, spec, one.class_names, one.domain)
        if "zero_shot" in spec:
            prompts = read_prompts(one.name, options.templates)
            if (found := score_zero_shot(module, one, prompts, batch_size=options.batch_size)) is not None:
                sets[one.name]["zero_shot"] = found
        if "classes" in spec and out is not None:
            with _writing(out):
                save_examples(out, one, sets[one.name]["classes"], before[one.name], after, module.image_spec)
    results: dict[str, Any] = {"sets": sets}
    if "retrieval" in spec and (found := score_retrieval(module, data.val_dataloader())) is not None:
        results["retrieval"] = found
    return {"protocol": protocols(spec, sets, "retrieval" in results), **shots_of(spec), **results}, out


def _out(folder: Path, spec: Any, sets: list[str], options: argparse.Namespace) -> Path | None:
    from wlsup.evaluation.judgement import shots_of

    if options.out is None and any(choice is not None for choice in (options.sets, options.metrics, options.shots)):
        found = {"sets": sets, "protocol": ["knn", *spec.metrics], **shots_of(spec)}
        if stays := left_as_it_is(folder / "evaluation.json", found):
            _log.warning("%s", stays)
            return None
    return options.out or folder


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WlsupError(f"Cannot write into {folder}: {error.strerror}. Give another folder with --out.") from error


def _evaluate_weights(spec: Any, options: argparse.Namespace) -> dict[str, Any]:
    from wlsup.cli.configuration import choose_eval_sets
    from wlsup.data.datamodule import CaptionDataModule
    from wlsup.evaluation.judgement import compare, protocols, shots_of
    from wlsup.models.foreign import open_encoder

    folder = Path(options.target)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    names = eval_sets_named(options.sets)
    data = CaptionDataModule(eval_sets=None if is_adapter else names, root=options.root)
    data.check_files()  # before an encoder is loaded for nothing
    # The others compare two encoders, or pictures with text.
    measured = tuple(name for name in spec.metrics if name in ("probe", "few_shot", "calibration", "classes"))
    if not measured:
        raise WlsupError(
            f"{', '.join(spec.metrics)}: an encoder alone has no such figures. Give a run's folder, or metrics of "
            "probe, few_shot, calibration, classes."
        )
    spec = replace(spec, metrics=measured)
    if is_adapter:
        module, data = load_adapter(folder)
        choose_eval_sets(data, options.sets, options.root)
    else:
        module = open_encoder(options.target)
    data.image_spec = module.image_spec
    sets = {
        one.name: compare(_judge(module, one, spec, options), None, spec, one.class_names, one.domain)
        for one in data.eval_datasets()
    }
    return {"protocol": protocols(spec, sets), **shots_of(spec), "sets": sets}


def _judge(
    module: Any, eval_set: Any, spec: Any, options: argparse.Namespace, vote: dict[str, Any] | None = None
) -> Any:
    import torch

    from wlsup.callbacks.evaluation import judged
    from wlsup.callbacks.knn import features_of, score_knn

    if torch.cuda.is_available():
        module = module.to("cuda")
    bank, queries = features_of(module, eval_set, batch_size=options.batch_size, num_workers=options.workers)
    found = score_knn(bank, queries, len(eval_set.class_names), **(vote or {}))
    return judged(module, eval_set, bank, queries, found, spec)
