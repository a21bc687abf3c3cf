"""Recipes and options to objects: LightningCLI, with the run's folder, one-message errors and suggestions."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import time
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from wlsup.approaches import APPROACHES, approach_class
from wlsup.approaches.base import Approach
from wlsup.callbacks.knn import KNN
from wlsup.callbacks.progress import training_progress
from wlsup.callbacks.reconstructions import Reconstructions
from wlsup.callbacks.retrieval import Retrieval
from wlsup.callbacks.run_folder import RunFolder
from wlsup.cli.logs import log_to_file
from wlsup.errors import WlsupError, choose

__all__ = ["WlsupCLI", "approach_named_in", "build_model", "configure", "load_run", "read_checkpoint", "train"]

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
        if self._model_class.name in APPROACHES:
            parser.add_lightning_class_args(KNN, "knn")
        parser.link_arguments("seed_everything", "data.seed")

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Give the trainer the run's folder, its loggers and callbacks."""
        self.run_dir = _run_dir(self.config)
        kwargs.setdefault("default_root_dir", str(self.run_dir))
        if self.config.trainer.logger in (None, True):
            kwargs["logger"] = [
                TensorBoardLogger(self.run_dir, name="", version="", default_hp_metric=False),
                CSVLogger(self.run_dir, name="", version="", flush_logs_every_n_steps=50),
            ]
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.extend(self._callbacks(trainer))
        # Lightning saves last, whatever the order of the rest
        trainer.callbacks.sort(key=lambda callback: isinstance(callback, ModelCheckpoint))
        return trainer

    def _callbacks(self, trainer: lightning.Trainer) -> list[Callback]:
        mine: list[Callback] = [
            Retrieval(),
            RunFolder(
                self.run_dir,
                config=self.parser.dump(self.config, skip_none=False),
                hyperparameters=_flat(self.config.as_dict()),
                identity={
                    "approach": self.config.approach,
                    "preset": self.config.preset,
                    "seed": self.config.seed_everything,
                },
            ),
        ]
        if trainer.loggers:
            mine.append(LearningRateMonitor(logging_interval="step"))
        if not any(isinstance(callback, ModelCheckpoint) for callback in trainer.callbacks):
            mine.append(
                ModelCheckpoint(self.run_dir / "checkpoints", filename="last", enable_version_counter=False)
            )
        if self.config.trainer.enable_progress_bar in (None, True):
            mine.extend(training_progress())
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
    kwargs: dict[str, Any] = {
        "model_class": model_class,
        "datamodule_class": data_class,
        "run": False,
        "save_config_callback": None,
        "seed_everything_default": 0,
        "trainer_defaults": {"enable_progress_bar": None, "enable_model_summary": False, "num_sanity_val_steps": 0,
                             "max_epochs": 1, "log_every_n_steps": 10},
        "parser_kwargs": {"exit_on_error": False, "prog": f"wlsup {command}"},
        "args": arguments,
    }
    kind = WlsupCLI if build else _ModelOnlyCLI
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise) if False else contextlib.nullcontext():
            return kind(**kwargs)
    except ArgumentError as error:
        raise WlsupError(_explain(str(error), kind, kwargs)) from error


class _ModelOnlyCLI(WlsupCLI):
    """Parses everything and builds the model only."""

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model = self.config_init.model
        self.datamodule = self.config_init.data


def approach_named_in(arguments: list[str]) -> str:
    """Return the approach that recipes and options name; the last one wins, as with every other key.

    Raises:
        WlsupError: none named, an unknown one, or a recipe that is not there (then with the valid approaches).
    """
    named = None
    position = 0
    while position < len(arguments):
        option, _, value = arguments[position].partition("=")
        if option in ("-c", "--config", "--approach"):
            if not value:
                position += 1
                value = arguments[position] if position < len(arguments) else ""
            named = value if option == "--approach" else _recipe(Path(value)).get("approach", named)
        position += 1
    if named is None:
        raise WlsupError(
            f"No approach is named. Give --approach NAME or a recipe with `approach: NAME`. Valid: {', '.join(APPROACHES)}."
        )
    return choose("approach", named, APPROACHES, hint="`wlsup approaches` says what each one is.")


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if path.suffix == ".yaml" and path.parent.is_dir() and path.stem not in APPROACHES:
            choose("approach", path.stem, APPROACHES, hint=f"(There is no recipe {path}.)")
        raise WlsupError(f"No recipe {path} (looked in {Path.cwd()}). Give the path of a YAML file with -c.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WlsupError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise WlsupError(f"The recipe {path} must be a YAML mapping of keys to values, not {type(recipe).__name__}.")
    return recipe


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
        os.environ[_RUN_DIR] = str(folder)
        return folder
    raise WlsupError(f"Cannot find a free name for a run in {parent}.")


def _explain(message: str, kind: type, kwargs: dict[str, Any]) -> str:
    """Turn jsonargparse's message into one sentence with the nearest valid key."""
    message = " ".join(message.split())
    unknown = re.search(r"""(?:Key|key|[Oo]ption|arguments?:?|keys? is not expected:?)\s*['"]?-{0,2}([\w.]+)""", message)
    keys = sorted(_keys(kind, kwargs))
    if unknown and "expected" in message or "nrecognized" in message or "accepted" in message:
        given = unknown.group(1) if unknown else message
        near = difflib.get_close_matches(given, keys, n=3, cutoff=0.6)
        group = given.rpartition(".")[0]
        siblings = [key for key in keys if key.rpartition(".")[0] == group] or keys
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        return f"Unknown key {given!r}.{hint} Valid{f' under {group}' if group else ''}: {', '.join(siblings)}."
    return message


def _keys(kind: type, kwargs: dict[str, Any]) -> set[str]:
    return set()


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
    if cli.trainer.is_global_zero:
        log_to_file(cli.run_dir / "run.log")
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.resume, weights_only=True)
