"""Recipes and options to objects: LightningCLI, with the run's folder, one-message errors and suggestions."""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from argparse import ArgumentError
from contextlib import nullcontext, suppress
from inspect import signature
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from wlsup.approaches import APPROACHES, approach_class
from wlsup.approaches.base import Approach
from wlsup.callbacks.captions import Captions
from wlsup.callbacks.ema import EMA
from wlsup.callbacks.guards import Guards
from wlsup.callbacks.keyed_randomness import KeyedRandomness
from wlsup.callbacks.knn import KNN
from wlsup.callbacks.progress import training_progress
from wlsup.callbacks.projector import Projector
from wlsup.callbacks.reconstructions import Reconstructions
from wlsup.callbacks.retrieval import Retrieval
from wlsup.callbacks.routing import RoutingMonitor
from wlsup.callbacks.run_folder import FIRST_HYPERPARAMETERS, RunFolder
from wlsup.cli.lacking import refuse_what_lacks
from wlsup.cli.logs import log_to_file
from wlsup.cli.recipes import approach_named_in
from wlsup.errors import WlsupError

__all__ = ["WlsupCLI", "build_model", "configure", "load_run", "read_checkpoint", "train"]

_RUN_DIR = "WLSUP_RUN_DIR"  # how the processes of one run agree on its folder


class WlsupCLI(LightningCLI):
    """LightningCLI over one model class and one data module, with the suite's callbacks and run folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run has beside model, data and trainer."""
        parser.add_argument("--approach", type=str, default=self._model_class.name, help="name of the approach")
        parser.add_argument("--preset", type=str, default="mini", help="a label: mini or paper")
        parser.add_argument("--runs", type=str, default="runs", help="where run folders go")
        parser.add_argument("--run_dir", type=str | None, default=None, help="this run's folder, instead of a new one")
        parser.add_argument("--resume", type=str | None, default=None, help="checkpoint to go on from")
        parser.add_lightning_class_args(Reconstructions, "reconstructions")
        parser.add_lightning_class_args(Guards, "guards")
        if self._model_class.name in APPROACHES:
            parser.add_lightning_class_args(KNN, "knn")
            parser.add_lightning_class_args(Captions, "captioning")
            parser.add_lightning_class_args(Projector, "projector")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with errors in our words.

        Raises:
            WlsupError: an unknown key or a wrong value, with the valid ones.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise WlsupError(_explain(str(error), parser)) from error

    def before_instantiate_classes(self) -> None:
        """Refuse a run that lacks several things with all of them listed, before weights are fetched."""
        refuse_what_lacks(self.config)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Give the trainer the run's folder, its loggers and the suite's callbacks."""
        self.datamodule.check_files()  # before there is a folder to leave behind
        self.run_dir = _run_dir(self.config)
        kwargs.setdefault("default_root_dir", str(self.run_dir))
        kwargs["enable_progress_bar"] = sys.stderr.isatty()
        if self.config.trainer.logger in (None, True):
            kwargs["logger"] = [
                TensorBoardLogger(self.run_dir, name="", version="", default_hp_metric=False),
                CSVLogger(self.run_dir, name="", version="", flush_logs_every_n_steps=50),
            ]
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: Any, callbacks: list[Callback]) -> lightning.Trainer:
        given = config.get("callbacks") or []
        mine = self._callbacks(given if isinstance(given, list) else [given], logs=config.get("logger") is not False)
        return super()._instantiate_trainer(config, [EMA(), *callbacks, *mine])  # those after it see the average

    def _callbacks(self, given: list[Callback], logs: bool) -> list[Callback]:
        mine: list[Callback] = [
            KeyedRandomness(self.config.seed_everything),
            Retrieval(),
            *([RoutingMonitor()] if logs else []),
            RunFolder(
                self.run_dir,
                config=self.parser.dump(self.config, skip_none=False),
                hyperparameters=_hyperparameters(self.config),
                identity={
                    "approach": self.config.approach,
                    "preset": self.config.preset,
                    "seed": self.config.seed_everything,
                },
            ),
            *training_progress(),
        ]
        if logs:
            mine.append(LearningRateMonitor(logging_interval="step"))
        if self.config.trainer.enable_checkpointing is not False and not any(
            isinstance(callback, ModelCheckpoint) for callback in given
        ):
            folder = self.run_dir / "checkpoints"
            mine.append(ModelCheckpoint(folder, filename="last", enable_version_counter=False))
        return mine


def configure(
    model_class: type, data_class: type, arguments: list[str], command: str, *, build: bool = True
) -> WlsupCLI:
    """Parse recipes and options and, unless told not to, build trainer, model and data.

    Args:
        model_class: the LightningModule whose arguments are under ``model``.
        data_class: the LightningDataModule whose arguments are under ``data``.
        arguments: as typed after the command.
        command: for the messages.
        build: False parses and builds the model only.

    Raises:
        WlsupError: an unknown key, a wrong value, an unreadable recipe: one message, with the valid choices.
    """
    kind = WlsupCLI if build else _ModelOnlyCLI
    return kind(
        model_class=model_class,
        datamodule_class=data_class,
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults={
            "enable_model_summary": False,
            "enable_progress_bar": False,  # the suite's own stands in for it
            "log_every_n_steps": 10,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
        },
        parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": f"wlsup {command}"},
        args=["--help" if argument == "--help-all" else argument for argument in arguments],
    )


class _ModelOnlyCLI(WlsupCLI):
    """Parses everything and builds the model only."""

    def before_instantiate_classes(self) -> None:
        """Do not look for data that is not needed."""

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model = self.config_init.model
        self.datamodule = self.config_init.data


def _run_dir(config: Namespace) -> Path:
    if config.run_dir:
        return Path(config.run_dir)
    if os.environ.get(_RUN_DIR):
        return Path(os.environ[_RUN_DIR])
    parent = Path(config.runs) / config.approach / config.preset / f"seed{config.seed_everything}"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        folder = parent / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise WlsupError(f"Cannot make the run's folder {folder}: {error.strerror}. Set --runs DIR.") from error
        return folder
    raise WlsupError(f"Cannot find a free name for a run in {parent}.")


def _explain(message: str, parser: LightningArgumentParser) -> str:
    """Turn jsonargparse's message into ours: what was given, what is allowed, the nearest valid key."""
    keys = sorted({action.dest for action in parser._actions if action.dest not in ("help", "print_config")})
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    unknown = re.search(r"(?:Option '|unrecognized arguments: -*|Key ')([\w.]+)", message)
    if in_group or unknown:
        given = ".".join(in_group.groups()) if in_group else unknown.group(1)
        if not in_group and f"--{given}" not in message and "Option" not in message:
            return f"Unexpected argument {given!r}. Options look like --KEY VALUE; recipes come after -c."
        near = difflib.get_close_matches(given, keys, n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        parent = given.rpartition(".")[0]
        while parent and not any(key.startswith(parent + ".") for key in keys):
            parent = parent.rpartition(".")[0]
        prefix = parent + "." if parent else ""
        siblings = sorted({prefix + key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)})
        return f"Unknown key {given!r}.{hint} Valid{f' under {parent}' if parent else ''}: {', '.join(siblings)}."
    key = re.search(r'Parser key "([\w.]+)":', message)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if key and value:
        literals = dict.fromkeys(re.findall(r"'([^']*)'", " ".join(re.findall(r"Literal\[([^]]*)\]", message))))
        types = dict.fromkeys(re.findall(r"<class '(?:\w+\.)*(\w+)'>", message))
        allowed = ", ".join(literals) or " or ".join(name for name in types if name != "NoneType")
        return f"{key.group(1)} cannot be {value.group(1).strip()!r}. Allowed: {allowed or 'see --help-all'}."
    return " ".join(message.split())


_TRAINER = (
    "max_epochs",
    "max_steps",
    "precision",
    "gradient_clip_val",
    "accumulate_grad_batches",
    "devices",
    "num_nodes",
)
_NOT_HYPERPARAMETERS = (  # where things lie, how much is shown, how fast it is read: nothing that a result depends on
    "data.seed", "data.num_workers", "data.root", "data.images", "data.captions", "data.manifest", "data.decoder",
    "data.eval_sets", "data.max_bad_fraction", "data.cache_features", "model.generation.",
)  # fmt: skip


def _hyperparameters(config: Namespace) -> dict[str, bool | int | float | str]:
    """Return what was chosen and changes what is trained, flat, for TensorBoard's HParams tab; nothing left unset."""
    told = config.as_dict()
    chosen = {name: told.get(name) for name in ("approach", "preset", "model", "data", "optimizer", "lr_scheduler")}
    chosen["trainer"] = {name: told["trainer"].get(name) for name in _TRAINER}
    flat = {"seed": told["seed_everything"], **_flat(chosen)}
    kept = {k: v for k, v in flat.items() if v != "None" and not k.startswith(_NOT_HYPERPARAMETERS)}
    return {name: kept[name] for name in (*(n for n in FIRST_HYPERPARAMETERS if n in kept), *kept)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, child in value.items() for k, v in _flat(child, f"{prefix}{name}.").items()}
    simple = isinstance(value, bool | int | float | str)
    return {prefix[:-1]: value if simple else str(value)}


def build_model(model_class: type, arguments: list[str], command: str) -> Approach:
    """Return the model that recipes and options describe, without trainer and data."""
    from wlsup.data.datamodule import CaptionDataModule

    return configure(model_class, CaptionDataModule, arguments, command, build=False).model


def load_run(folder: Path) -> tuple[Approach, lightning.LightningDataModule]:
    """Return a finished run's model, as trained, and its data module.

    Raises:
        WlsupError: no configuration or checkpoint in ``folder``, or one that does not fit.
    """
    from wlsup.data.datamodule import CaptionDataModule

    arguments = ["-c", str(folder / "config.yaml")]
    cli = configure(approach_class(approach_named_in(arguments)), CaptionDataModule, arguments, "knn", build=False)
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    cli.model.on_load_checkpoint(checkpoint)
    cli.model.load_state_dict(checkpoint["state_dict"], strict=False)
    return cli.model.eval(), cli.datamodule


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; code inside it never runs.

    Raises:
        WlsupError: missing, damaged, or holding more than tensors and plain values.
    """
    if not path.is_file():
        raise WlsupError(f"No checkpoint {path.absolute()}. Give the path of a run's checkpoints/last.ckpt.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's, zipfile's and its own by turns
        raise WlsupError(
            f"{path} is not a checkpoint that can be trusted and read ({type(error).__name__}): it is damaged, or "
            "holds code. Use an earlier checkpoint, or start again."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise WlsupError(f"{path} is not a checkpoint of wlsup: it has no state_dict.")
    return checkpoint


def train(cli: WlsupCLI) -> None:
    """Fit, resuming where asked; the run's log file receives what the terminal does."""
    if cli.config.resume:
        read_checkpoint(Path(cli.config.resume))
    log = log_to_file(cli.run_dir / "run.log") if cli.trainer.is_global_zero else nullcontext()
    before = os.environ.get(_RUN_DIR)
    os.environ[_RUN_DIR] = str(cli.run_dir)  # the processes that fit() starts inherit it; the next run does not
    # Lightning before 2.6 has no such argument; the checkpoint has then been read safely once, above
    safely = {"weights_only": True} if "weights_only" in signature(cli.trainer.fit).parameters else {}
    try:
        with log:
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.resume, **safely)
    except WlsupError:
        if cli.trainer.is_global_zero:
            _forget_unbegun(cli.run_dir)
        raise
    finally:
        os.environ.pop(_RUN_DIR) if before is None else os.environ.update({_RUN_DIR: before})


def _forget_unbegun(folder: Path) -> None:
    """Take away the folder of a run that was refused before it wrote its configuration."""
    if (folder / "config.yaml").is_file():
        return
    for file in (folder / "run.log", *folder.glob("events.out.tfevents.*")):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # something else lies in it: then it stays
        folder.rmdir()
