"""``wlsup knn``: score a finished run, or any encoder, by k-NN; no training needed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from wlsup.cli.export import ADAPTER_CONFIG, load_adapter
from wlsup.cli.logs import log_to_terminal
from wlsup.cli.parser import CommandParser, given_numbers
from wlsup.cli.recipes import eval_sets_named, holds_run, knn_options
from wlsup.errors import WlsupError

__all__ = ["HELP", "run"]

HELP = """\
usage: wlsup knn RUN|WEIGHTS [options]

Score an encoder by weighted k-NN, without training.

  RUN|WEIGHTS                   a run's folder, or what `wlsup export` made of one; or mini, any timm name (not ViTs
                                alone), hf-hub:ID, a local weight file or folder
  --sets NAME,..|FILE.yaml      eval sets: cifar10, cifar100, svhn, eurosat, dtd, imagenet, mini_shapes, ...; or those
                                of a recipe, your own among them (data: {eval_sets: [...]}); by default the run's
                                own, or the four mini ones
  --root DIR                    the folder of the published sets (by default the run's; the environment's
                                WLSUP_DATA; ./data)
  --random                      random weights of the same architecture (seed 0), for comparison
  --pixels                      raw pixels instead of features, for comparison
  --batch-size N                pictures a forward pass (256)
  --workers N                   processes that read pictures (0)
  --json                        machine-readable, complete
"""


def run(arguments: list[str]) -> int:
    """Print accuracy by set and k, each with Wilson's interval over the queries."""
    parser = CommandParser("knn")
    parser.add_argument("target")
    parser.add_argument("--sets")
    parser.add_argument("--root")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--pixels", action="store_true")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    given_numbers(options, "batch_size", "workers")
    log_to_terminal(quiet=options.json)
    entries = _score(options)
    if options.json:
        from wlsup.evaluation.knn import protocol_of

        print(
            json.dumps({"target": options.target, "protocol": protocol_of(entries.values()), "knn": entries}, indent=2)
        )
        return 0
    from rich.console import Console

    _show(options.target, entries, Console())
    return 0


def _show(target: str, entries: dict[str, Any], console: Any) -> None:
    from rich.measure import Measurement
    from rich.table import Table

    from wlsup.evaluation.knn import protocol_id

    ks = sorted({k for entry in entries.values() for k in entry["accuracy"]}, key=int)
    table = Table(title=f"k-NN accuracy of {target}, %", title_justify="left")
    for column in ("set", "domain", "bank", "queries", *(f"k={k}" for k in ks)):
        table.add_column(column, justify="left" if column in ("set", "domain") else "right", no_wrap=True)
    for name, entry in entries.items():
        scores = [_score_of(entry, k) for k in ks]
        table.add_row(name, entry["domain"], str(entry["train"]), str(entry["test"]), *scores)
    # Its own width: in a terminal too narrow for it lines wrap, where rich would cut numbers short.
    table.width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.print(table, soft_wrap=True)
    temperature = next((entry["temperature"] for entry in entries.values()), 0.07)
    protocol = protocol_id(20, temperature).replace(" k=20", "")
    print(f"In brackets Wilson's 95 % interval over the queries. Protocol: {protocol}, k as in the columns.")


def _score_of(entry: dict[str, Any], k: str) -> str:
    if k not in entry["accuracy"]:
        return "-"
    low, high = entry["ci95"][k]
    return f"{100 * entry['accuracy'][k]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _score(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from wlsup.callbacks.knn import evaluate_knn
    from wlsup.cli.configuration import choose_eval_sets, load_run
    from wlsup.data.datamodule import CaptionDataModule
    from wlsup.evaluation.statistics import wilson
    from wlsup.models.foreign import open_encoder

    folder = Path(options.target)
    names = eval_sets_named(options.sets)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    is_run = is_adapter or holds_run(folder)
    data = CaptionDataModule(eval_sets=None if is_run else names, root=options.root)
    if not is_run:
        data.check_files()  # before an encoder is loaded for nothing
    if is_run:
        if options.random or options.pixels:
            raise WlsupError("--random and --pixels compare an encoder, not a run: give the encoder's weights.")
        module, data = load_adapter(folder) if is_adapter else load_run(folder)
        spec = module.image_spec
        choose_eval_sets(data, options.sets, options.root)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # random weights are the same in every call
            module = open_encoder(options.target, pretrained=not options.random)
        spec = module.image_spec
        if options.pixels:
            module = _Pixels()
    data.image_spec = spec
    if torch.cuda.is_available():
        module = module.to("cuda")
    entries = {}
    vote = knn_options(folder) if is_run else {}
    for eval_set in data.eval_datasets():
        result = evaluate_knn(module, eval_set, **vote, batch_size=options.batch_size, num_workers=options.workers)
        entries[eval_set.name] = {
            "domain": eval_set.domain,
            "k": result.k,
            "temperature": result.temperature,
            "train": result.train,
            "test": result.test,
            "accuracy": {str(k): accuracy for k, accuracy in result.accuracy.items()},
            "ci95": {
                str(k): list(wilson(round(accuracy * result.test), result.test)[1:])
                for k, accuracy in result.accuracy.items()
            },
        }
    return entries


def _Pixels() -> Any:  # noqa: N802
    import torch

    class Pixels(torch.nn.Module):
        """The picture itself as its feature."""

        def __init__(self) -> None:
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(1))

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    return Pixels()
