"""``wlsup wise-ft``: score a finished run along the line from the pretrained encoder to the fine-tuned one."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from wlsup.cli.earlier import left_as_it_is
from wlsup.cli.logs import log_to_terminal
from wlsup.cli.parser import CommandParser, given_numbers
from wlsup.cli.recipes import knn_options
from wlsup.errors import WlsupError

__all__ = ["HELP", "check_finished", "numbers", "run"]

HELP = """\
usage: wlsup wise-ft RUN [options]

Score theta = (1 - a) pretrained + a finetuned by k-NN on every set, for a from 0 to 1, and choose a on validation
pictures of the in-domain sets. Writes wise_ft.json, wise_ft.png and wise_ft.svg into the run's folder; a choice of
--alphas or --sets does so only if it loses nothing that the run's curve has.

  RUN                           a finished run's folder
  --alphas A,A,..               places on the line, 0 and 1 among them (0,0.1,..,1)
  --sets NAME,..                eval sets (by default the run's own)
  --root DIR                    the folder of the published sets (by default the run's)
  --probe                       score by a linear probe, too (slower)
  --out DIR                     where to write in any case, in place of the run's folder
  --batch-size N                pictures a forward pass (256)
  --workers N                   processes that read pictures (0)
  --json                        machine-readable, complete
"""

_log = logging.getLogger("wlsup")


def run(arguments: list[str]) -> int:
    """Print the curve and write it."""
    parser = CommandParser("wise-ft")
    parser.add_argument("run")
    parser.add_argument("--alphas")
    parser.add_argument("--sets")
    parser.add_argument("--root")
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    given_numbers(options, "batch_size", "workers")
    folder = Path(options.run)
    check_finished(folder)
    log_to_terminal(quiet=options.json)
    curve, title, written = _curve(folder, options)
    if options.json:
        print(json.dumps(curve, indent=2))
        return 0
    from wlsup.evaluation.wise_ft_table import wise_ft_text

    print(wise_ft_text(curve, title))
    for path in written:
        _log.info("wrote %s", path)
    return 0


def check_finished(folder: Path) -> None:
    """Refuse what is no finished run.

    Raises:
        WlsupError: naming what it lacks.
    """
    for what in ("config.yaml", "checkpoints/last.ckpt"):
        if not (folder / what).is_file():
            raise WlsupError(
                f"No finished run in {folder}: it has no {what}. Give the folder that `wlsup fit` named, such as "
                "runs/film/mini/seed0/<time>."
            )


def numbers(text: str, option: str) -> list[float]:
    """Read "0,0.5,1".

    Raises:
        WlsupError: something in it is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise WlsupError(f"{option} {text!r}: give numbers with commas between them, such as 0,0.5,1.") from None


def _curve(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str, list[Path]]:
    from wlsup.evaluation.wise_ft import ALPHAS, check_alphas

    alphas = check_alphas(ALPHAS if options.alphas is None else numbers(options.alphas, "--alphas"))
    import torch

    from wlsup.callbacks.wise_ft import curve_of_run, refuse_no_line, write_curve
    from wlsup.cli.configuration import choose_eval_sets, load_run

    module, data = load_run(folder)
    refuse_no_line(module)
    title = _title(folder, module.name)  # before hours of computing, should a file of the run's be damaged
    data.image_spec = module.image_spec
    choose_eval_sets(data, options.sets, options.root)
    if not data.eval_sets:
        raise WlsupError(f"The run {folder} has no eval_sets to score. Name some with --sets, such as mini_shapes.")
    start = module.start.tensors
    state = module.state_dict()
    end = {name: state[name].detach().clone() for name in start}
    if torch.cuda.is_available():
        module = module.to("cuda")
    curve = curve_of_run(
        module,
        start,
        end,
        data.eval_datasets(),
        alphas=alphas,
        **knn_options(folder),
        probe=options.probe,
        batch_size=options.batch_size,
        num_workers=options.workers,
    )
    if options.out is None:
        found = {"sets": curve["sets"], "alphas": curve["alphas"], "protocol": curve["protocol"].split("; ")}
        if stays := left_as_it_is(folder / "wise_ft.json", found):
            _log.warning("%s", stays)
            return curve, title, []
    return curve, title, write_curve(curve, Path(options.out or folder), title)


def _title(folder: Path, approach: str) -> str:
    results = folder / "results.json"
    if not results.is_file():
        return f"WiSE-FT: {approach}, {folder}"
    from wlsup.models.weights import read_json

    said = read_json(results)
    return f"WiSE-FT: {approach}, {said.get('preset')}, seed {said.get('seed')}"
