"""Recipes and options to objects: LightningCLI, with the run's folder, one-message errors and suggestions."""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from argparse import ArgumentError
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO

from wlsup.approaches import APPROACHES, approach_class
from wlsup.approaches.base import Approach
from wlsup.callbacks.captions import Captions
from wlsup.callbacks.checkpoints import CheckpointFiles, Checkpoints
from wlsup.callbacks.ema import EMA
from wlsup.callbacks.evaluation import Evaluation
from wlsup.callbacks.guards import Guards
from wlsup.callbacks.keyed_randomness import KeyedRandomness
from wlsup.callbacks.knn import KNN
from wlsup.callbacks.progress import training_progress
from wlsup.callbacks.projector import Projector
from wlsup.callbacks.reconstructions import Reconstructions
from wlsup.callbacks.retrieval import Retrieval
from wlsup.callbacks.routing import RoutingMonitor
from wlsup.callbacks.run_folder import FIRST_HYPERPARAMETERS, RunFolder
from wlsup.callbacks.spectra import Spectra
from wlsup.callbacks.wise_ft import WiseFT
from wlsup.checkpoint_file import read_checkpoint
from wlsup.cli.environments import cluster_environment
from wlsup.cli.lacking import refuse_what_lacks
from wlsup.cli.launch_check import check_this_launch
from wlsup.cli.loggers import run_loggers
from wlsup.cli.recipes import approach_named_in, eval_sets_named
from wlsup.cli.sharded_strategy import ShardedStrategy, units_of
from wlsup.cli.training import RUN_DIR, resumption
from wlsup.errors import WlsupError

__all__ = ["WlsupCLI", "build_model", "choose_eval_sets", "configure", "load_run", "pretrained_run", "untrained_run"]

TOGETHER = timedelta(days=1)
"""How long processes wait for one another. The first measures alone when training ends: WiSE-FT's curve, spectra,
probes of large sets take longer than the half hour after which torch would end the job."""


class WlsupCLI(LightningCLI):
    """LightningCLI over one model class and one data module, with the suite's callbacks and run folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run has beside model, data and trainer."""
        parser.add_argument("--approach", type=str, default=self._model_class.name, help="name of the approach")
        parser.add_argument("--preset", type=str, default="mini", help="a label: mini or paper")
        parser.add_argument("--runs", type=str, default="runs", help="where run folders go")
        parser.add_argument("--run_dir", type=str | None, default=None, help="this run's folder, instead of a new one")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="checkpoint to go on from; auto: the run's newest"
        )
        parser.add_lightning_class_args(Reconstructions, "reconstructions")
        parser.add_lightning_class_args(Guards, "guards")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        if self._model_class.name in APPROACHES:
            parser.add_lightning_class_args(KNN, "knn")
            parser.add_lightning_class_args(Evaluation, "evaluation")
            parser.add_lightning_class_args(Captions, "captioning")
            parser.add_lightning_class_args(WiseFT, "wise_ft")
            parser.add_lightning_class_args(Spectra, "spectra")
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
        """Refuse a wrong launch, and a run that lacks several things with all listed, before anything is made."""
        check_this_launch(self.config)
        refuse_what_lacks(self.config)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Give the trainer the run's folder, its loggers and the suite's callbacks."""
        self.datamodule.check_files()  # before there is a folder to leave behind
        if self.config.trainer.strategy == "fsdp":
            units_of(self.model)
        self.run_dir = _run_dir(self.config)
        self.resumption = resumption(self.config.resume, self.run_dir)
        kwargs.setdefault("default_root_dir", str(self.run_dir))
        kwargs["enable_progress_bar"] = sys.stderr.isatty()
        if self.config.trainer.logger in (None, True):
            kwargs["logger"] = run_loggers(self.run_dir, self.resumption.step)
        plugins = self.config.trainer.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, CheckpointFiles()]
        environment = cluster_environment(os.environ)
        if environment is not None and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            plugins = [*plugins, environment]
        kwargs["plugins"] = plugins
        if self.config.trainer.strategy == "fsdp":
            kwargs["strategy"] = ShardedStrategy()
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: Any, callbacks: list[Callback]) -> lightning.Trainer:
        mine = self._callbacks(logs=config.get("logger") is not False)
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoints)]
        trainer = super()._instantiate_trainer(config, [EMA(), *callbacks, *mine])  # those after it see the average
        if hasattr(trainer.strategy, "_timeout"):  # of strategies of several processes; "auto" cannot be told it else
            trainer.strategy._timeout = TOGETHER
        return trainer

    def _callbacks(self, logs: bool) -> list[Callback]:
        again = self.config.clone()  # what re-runs it makes a run of its own
        again.run_dir = again.resume = None
        mine: list[Callback] = [
            KeyedRandomness(self.config.seed_everything),
            Retrieval(),
            *([RoutingMonitor()] if logs else []),
            RunFolder(
                self.run_dir,
                config=self.parser.dump(again, skip_none=False),
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
    if os.environ.get(RUN_DIR):
        return Path(os.environ[RUN_DIR])
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
    """Return a finished run's model, as trained, and its data module; the model remembers where training started.

    Raises:
        WlsupError: no configuration or checkpoint in ``folder``, or one that does not fit.
    """
    cli = _run_before_training(folder)
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    cli.model.on_load_checkpoint(checkpoint)
    cli.model.start.remember(cli.model)
    cli.model.load_state_dict(checkpoint["state_dict"], strict=False)
    return cli.model.eval(), cli.datamodule


def choose_eval_sets(data: lightning.LightningDataModule, names: str | None, root: str | None) -> None:
    """Have a run's data module evaluate on other sets, or find them elsewhere.

    Args:
        data: of the run; a name means what it meant in the run, where the run had it.
        names: separated by commas; None for the run's own sets.
        root: the folder of the published sets; None for the run's own.

    Raises:
        WlsupError: an unknown set, or one that is not there.
    """
    from wlsup.data.evalsets import check_eval_sets, locate_eval_set

    data.root = root or data.root
    if names is not None:
        described = {getattr(entry, "name", entry): entry for entry in data.eval_sets}
        wanted = eval_sets_named(names) or []
        data.eval_sets = [described.get(entry, entry) if isinstance(entry, str) else entry for entry in wanted]
        check_eval_sets(data.eval_sets)
    for entry in data.eval_sets:
        locate_eval_set(entry, data.root)


def untrained_run(folder: Path) -> Approach:
    """Return a run's model as it was before step 1."""
    model, checkpoint = _run_before_training(folder).model, folder / "checkpoints" / "last.ckpt"
    if getattr(model, "start_in_checkpoint", False) and checkpoint.is_file():
        model.on_load_checkpoint(read_checkpoint(checkpoint))  # seed and configuration alone do not make it again
    return model.eval()


def pretrained_run(folder: Path) -> torch.nn.Module:
    """Return what a run's k-NN calls pretrained: its model before step 1, or the encoder under one that begins else."""
    model = untrained_run(folder)
    return model if model.identity_at_start else model.pretrained().eval()


def _run_before_training(folder: Path) -> WlsupCLI:
    from wlsup.data.datamodule import CaptionDataModule

    arguments = ["-c", str(folder / "config.yaml")]
    return configure(approach_class(approach_named_in(arguments)), CaptionDataModule, arguments, "knn", build=False)
