"""The ``wlsup`` command: a light front that imports torch only once there is work for it."""

from __future__ import annotations

import importlib
import sys

from wlsup import __version__
from wlsup.errors import WlsupError, choose

__all__ = ["COMMANDS", "main"]

# name -> (module with run(arguments) -> exit code, what it does, usage)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "fit": (
        "wlsup.cli.fit",
        "teach an encoder with captions and print the k-NN table",
        "-c RECIPE.yaml.. [--KEY VALUE]",
    ),
    "pretrain": ("wlsup.cli.pretrain", "pretrain a ViT by MAE on pictures alone", "-c RECIPE.yaml.. [--KEY VALUE]"),
    "approaches": ("wlsup.cli.approaches", "list the approaches and what each trains", "[--json] [--markdown]"),
    "inspect": (
        "wlsup.cli.inspect",
        "show what an approach trains and freezes",
        "APPROACH [-c RECIPE.yaml..] [--json]",
    ),
    "knn": ("wlsup.cli.knn", "score a run, or any encoder, by k-NN", "RUN|WEIGHTS [--sets NAME,..] [--root DIR]"),
    "wise-ft": (
        "wlsup.cli.wise_ft",
        "score the line from the pretrained to the fine-tuned encoder",
        "RUN [--alphas A,..] [--json]",
    ),
    "export": (
        "wlsup.cli.export",
        "write an encoder that timm loads, or its adapter, with a model card",
        "RUN [--alpha A] [--adapter-only] [-o DIR]",
    ),
    "evaluate": (
        "wlsup.cli.evaluate",
        "compare a run with its pretrained encoder by more than k-NN",
        "RUN|WEIGHTS [--metrics NAME,..] [--json]",
    ),
    "caption": (
        "wlsup.cli.caption",
        "caption pictures with what a run has trained",
        "RUN IMAGE.. [--method NAME] [--json]",
    ),
    "spectra": (
        "wlsup.cli.spectra",
        "WeightWatcher's figures of a run's weights, or any's",
        "RUN|WEIGHTS [--layers GLOB] [--json]",
    ),
    "report": (
        "wlsup.cli.report",
        "compare runs on one self-contained page",
        "RUN.. [-o report.html] [--figures DIR]",
    ),
    "plan-scale": (
        "wlsup.cli.plan_scale",
        "say what a run would take on so many GPUs: memory, seconds, efficiency",
        "[APPROACH] [--nodes N] [--json]",
    ),
    "upcycle": (
        "wlsup.cli.upcycle",
        "turn a dense model's MLPs into mixtures of experts",
        "WEIGHTS OUT [--experts N] [--every N]",
    ),
    "data": ("wlsup.cli.data", "list, fetch, prepare and check data sets", "list|fetch|prepare|check [NAME] [--json]"),
}

_FIT_HELP = """\
usage: wlsup fit -c RECIPE.yaml [-c OVERLAY.yaml ...] [--KEY VALUE ...]

Teach a vision encoder with captions: k-NN of the pretrained encoder, training, k-NN again, a table, results.json.
Later recipes and options override earlier ones; a YAML key `a: {{b: 1}}` is the option --a.b 1.

  --approach NAME               {approaches}
  --seed_everything N           seed of everything (0)
  --preset NAME                 a label for the run's folder (mini)
  --runs DIR                    where runs go: DIR/<approach>/<preset>/seed<k>/<time>/ (runs)
  --resume CKPT|auto            go on from a checkpoint of the same approach and base model; auto, with
                                -c RUN/config.yaml --run_dir RUN: from that run's newest
  --data.source NAME            mini | table | coco | conceptual_captions | imagenet_captions |
                                imagenet_class_names | shards
  --data.captions FILE          of table: CSV, TSV or JSONL of picture and caption; else the file as published
  --data.images DIR|TAR|ZIP     where the pictures lie; of shards their folder
  --data.pairs N|null           how many pictures, the same ones on every machine; null: all
  --data.max_bad_fraction X     of the pictures, may be missing or unreadable (0.05)
  --data.manifest FILE          another run's manifest.txt: its very pictures again
  --data.batch_size N           pairs a step
  --data.num_workers N          processes that read pictures
  --data.decoder NAME           auto | simplejpeg | opencv | torchvision | pil_draft | pil
  --data.shuffle_window N       tar shards shuffled together, for file systems that dislike random reads
  --data.eval_sets LIST         cifar10, cifar100, svhn, eurosat, dtd, imagenet, the mini ones, or
                                {{name, kind, images, labels, domain}}
  --data.root DIR               the folder of the published eval sets (the environment's WLSUP_DATA, else ./data)
  --model.encoder.weights W     mini, a timm name, hf-hub:ID, or a local file or folder
  --model.text.weights W        mini, a hub id, or a local folder
  --model.lr X                  learning rate of what trains
  --trainer.max_epochs N        passes over the pairs
  --trainer.precision P         32-true, bf16-mixed, 16-mixed
  --trainer.devices N           processes, one a GPU
  --knn.every_n_epochs N        also score along the way
  --wise_ft.enabled true        when trained, score the line from the pretrained to the fine-tuned encoder, too
  --spectra.enabled true        WeightWatcher's figures before and after (docs/spectra.md); --spectra.every_n_epochs N
  --evaluation.metrics LIST     more than k-NN at the end: probe, few_shot, calibration, drift, classes, zero_shot,
                                retrieval ([drift, classes])
  --captioning.pictures N       of captioners: held-out pictures that are captioned and scored at the end (128)
  --projector.pictures N        in TensorBoard's projector: so many test pictures of each set, before and after (0)
  --print_config                print the whole resolved configuration
  --help-all                    every option of --approach NAME, mae_lm's without (imports torch: some seconds)
"""

_PRETRAIN_HELP = """\
usage: wlsup pretrain -c RECIPE.yaml [-c OVERLAY.yaml ...] [--KEY VALUE ...]

Pretrain a ViT by masked autoencoding on pictures alone; the run's folder gets model/, for --model.encoder.weights.

  --seed_everything N           seed of everything (0)
  --preset NAME                 a label for the run's folder (mini)
  --runs DIR                    where runs go: DIR/mae/<preset>/seed<k>/<time>/ (runs)
  --resume CKPT                 go on from a checkpoint
  --data.images LIST            folders and tars of pictures; none for the generated ones
  --data.batch_size N           pictures a step
  --model.encoder.architecture  a timm name, or vit(img_size=64,patch_size=8,embed_dim=128,depth=6,num_heads=4)
  --model.decoder.width N       and depth, heads, normalize_pixels
  --model.mask_ratio X          share of the patches removed (0.75)
  --model.lr X                  learning rate
  --trainer.max_epochs N        passes over the pictures
  --trainer.precision P         32-true, bf16-mixed, 16-mixed
  --help-all                    every option there is (imports torch: some seconds)
"""


def usage() -> str:
    """Return the help of ``wlsup`` itself."""
    lines = [f"wlsup {__version__}: weak language supervision of pretrained vision encoders", "", "commands:"]
    lines += [f"  wlsup {name:<11}{use:<43}{what}" for name, (_, what, use) in COMMANDS.items()]
    lines += ["", "`wlsup COMMAND --help` says more. A first run: make train APPROACH=film"]
    return "\n".join(lines)


def command_help(command: str) -> str:
    """Return the help of one command, without importing it."""
    if command in ("fit", "pretrain"):
        from wlsup.approaches import APPROACHES

        return (_FIT_HELP if command == "fit" else _PRETRAIN_HELP).format(approaches=" | ".join(APPROACHES))
    if command in ("caption", "data", "evaluate", "export", "knn", "report", "spectra", "upcycle", "wise-ft"):
        return importlib.import_module(COMMANDS[command][0]).HELP
    _, what, use = COMMANDS[command]
    return f"usage: wlsup {command} {use}\n\n{what[0].upper()}{what[1:]}."


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a `WlsupError` becomes one message on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        print(__version__)
        return 0
    try:
        command = choose("command", arguments[0], COMMANDS)
        if any(argument in ("-h", "--help") for argument in arguments[1:]):
            print(command_help(command))
            return 0
        return importlib.import_module(COMMANDS[command][0]).run(arguments[1:])
    except WlsupError as error:
        print(f"wlsup: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("wlsup: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
