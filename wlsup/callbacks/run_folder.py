"""The keeping of a run's folder: what was asked, what trained, on what machine, and what came out."""

from __future__ import annotations

import logging
import os
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from wlsup.callbacks.captions import Captions
from wlsup.callbacks.dashboard import dashboard_layout, log_hyperparameters
from wlsup.callbacks.guards import Guards
from wlsup.callbacks.knn import KNN, domain_intervals, domain_means
from wlsup.callbacks.retrieval import Retrieval
from wlsup.evaluation.caption_table import caption_markdown, print_caption_table
from wlsup.evaluation.knn import protocol_of
from wlsup.evaluation.table import knn_markdown, print_knn_table
from wlsup.evaluation.task_table import print_task_table, task_markdown
from wlsup.files import write_json, write_text
from wlsup.plan import plan_markdown
from wlsup.ranks import alone
from wlsup.sharding import has_shards

__all__ = ["FIRST_HYPERPARAMETERS", "RunFolder", "environment", "peak_memory", "processor_seconds"]

logger = logging.getLogger("wlsup")

# What tells runs apart: the HParams tab shows five unasked.
FIRST_HYPERPARAMETERS = ("approach", "seed", "model.lr", "data.pairs", "trainer.max_epochs")
_PACKAGES = ("wlsup", "torch", "torchvision", "lightning", "timm", "transformers", "numpy", "faiss-cpu")


def environment() -> dict[str, Any]:
    """Return versions, git commit and machine: what a result needs to be reproduced."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": sys.argv,
    }


def _git_commit() -> str | None:
    """Return the commit of the suite's own work tree; None without one, as where it is installed from a package."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
        )
    except OSError:  # there is no git
        return None
    return described.stdout.strip() or None if tracked.returncode == 0 else None


def peak_memory() -> dict[str, float | None]:
    """Return the most that this process has held since it began, in MiB: resident, and on its GPU (None without)."""
    status = Path("/proc/self/status")
    if status.is_file():  # a process begins with its parent's peak in what getrusage says, and without it here
        peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        resident = peak / 2**10
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident = peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"resident": round(resident, 1), "gpu": None if gpu is None else round(gpu, 1)}


def processor_seconds() -> float:
    """Return the seconds that this process and those it has waited for have computed, added up over cores.

    Beside the wall clock's seconds it says what a run costs, whatever else the machine was doing.
    """
    return sum(os.times()[:4])


def toys_told(module: Any, data: Any) -> str:
    """Say where captions of one's own meet what the package has to try things out with; "" where they do not."""
    if getattr(data, "source", "mini") == "mini":
        return ""
    models = [role for role, base in module.bases.items() if base["id"] == "mini"]
    sets = [str(getattr(one, "name", one)) for one in getattr(data, "eval_sets", ())]
    toys = [f"{role} model" for role in models] + ["evaluation sets"] * (sets != [] and all(map(_is_mini, sets)))
    if not toys:
        return ""
    options = {"encoder": "--model.encoder.weights", "text": "--model.text.weights", "language": "--model.language"}
    cures = [options.get(role, f"--model.{role}") for role in models] + ["--data.eval_sets"] * (len(toys) > len(models))
    return (
        f"captions of source {data.source!r} with the built-in mini {', '.join(toys)}, which are for trying things out "
        f"and know generated pictures and their few words alone: name real ones with {', '.join(cures)}."
    )


def _is_mini(name: str) -> bool:
    return name.startswith("mini_")


class RunFolder(Callback):
    """Write config, environment, plan and manifest when a run starts, results.json and the table when it ends.

    Args:
        folder: the run's folder.
        config: the run's whole configuration, as YAML that runs it again.
        hyperparameters: the same, flat, for TensorBoard's HParams tab.
        identity: "approach", "preset" and "seed", as results.json gives them.
    """

    def __init__(self, folder: Path, config: str, hyperparameters: dict[str, Any], identity: dict[str, Any]) -> None:
        self.folder, self.config, self.identity = folder, config, identity
        self.hyperparameters = hyperparameters
        self.samples_seen = 0
        self.seconds = 0.0
        self.processor_seconds = 0.0
        self.task: dict[str, Any] = {}
        self.memory: dict[str, float | None] = {}
        self.skipped: dict[str, str] = {}
        self._started = 0.0
        self._processor_started = 0.0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write what was asked, what trains, on which pictures, and on what machine; say what trains."""
        if not trainer.is_global_zero:
            return
        write_text(self.folder / "config.yaml", self.config)
        write_json(self.folder / "env.json", environment() | {"image_decoder": trainer.datamodule.image_decoder})
        trainer.datamodule.write_manifest(self.folder / "manifest.txt")

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say what trains; lay out TensorBoard: plan, custom scalars, hyperparameters and what they are judged by.

        Not in `setup`, which callbacks run before the model: some plans are decided there, from the first batches.
        """
        self._started, self._processor_started = time.perf_counter(), processor_seconds()
        if not trainer.is_global_zero:
            return
        plan = pl_module.plan.describe(pl_module)
        write_json(self.folder / "plan.json", {"approach": pl_module.name, "bases": pl_module.bases, **plan})
        logger.info("%s %s", pl_module.name, pl_module.plan.summary(pl_module))
        logger.info("on %s", ", ".join(f"{role} {base['id']}" for role, base in pl_module.bases.items()))
        if told := toys_told(pl_module, trainer.datamodule):
            logger.warning("%s", told)
        knn = _find(trainer, KNN)
        metrics = sorted(knn.baseline_metrics() if knn else (), key=_prominence)
        for board in _boards(trainer):
            board.experiment.add_text("plan", plan_markdown(plan), 0)
            board.experiment.add_custom_scalars(dashboard_layout(trainer.callbacks, pl_module))
            log_hyperparameters(board, self.hyperparameters, metrics, FIRST_HYPERPARAMETERS)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples."""
        self.samples_seen += len(batch) * trainer.world_size

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Hear from the other processes which of their pictures could not be read: checkpoints hold it."""
        self._hear_of_skipped(trainer)

    def _hear_of_skipped(self, trainer: lightning.Trainer) -> None:
        everyones = [trainer.datamodule.skipped]
        if trainer.world_size > 1:
            everyones *= trainer.world_size
            dist.all_gather_object(everyones, trainer.datamodule.skipped)
        for skipped in everyones:
            self.skipped |= skipped

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Have the approach measure what it is about beside k-NN, while it is still on its device."""
        self.memory = peak_memory()
        self._hear_of_skipped(trainer)
        here = trainer.is_global_zero or has_shards(pl_module)  # of a shared out model all processes compute
        if here and hasattr(pl_module, "measure"):
            with alone():
                self.task = pl_module.eval().measure(trainer.datamodule)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write results.json and show the table."""
        self.seconds += time.perf_counter() - self._started
        self.processor_seconds += processor_seconds() - self._processor_started
        if not trainer.is_global_zero:
            return
        results = self.results(trainer, pl_module)
        # Apart, so that the same seed gives the same results.json but for the time; and before it, since a run that has
        # its results.json is done.
        cost = {"seconds": results["seconds"], "processor_seconds": round(self.processor_seconds, 1)}
        write_json(self.folder / "cost.json", cost | {"peak_memory_mib": self.memory})
        write_json(self.folder / "results.json", results)
        if results["knn"]:
            for board in _boards(trainer):
                board.experiment.add_text("k-NN", knn_markdown(results), trainer.global_step)
            print_knn_table(results)
        if self.task:
            for board in _boards(trainer):
                board.experiment.add_text("task", task_markdown(self.task), trainer.global_step)
            print_task_table(self.task)
        if captioning := results["captioning"]:
            for board in _boards(trainer):
                board.experiment.add_text(
                    "captioning", caption_markdown(captioning, pl_module.name), trainer.global_step
                )
            print_caption_table(captioning, pl_module.name)
        skipped = results["captions"]["skipped"]
        if skipped:
            logger.warning("%d pictures could not be read and were replaced; results.json names them", len(skipped))
        for name, entry in results["knn"].items():
            if lost := entry.get("left_out"):
                logger.warning(
                    "%s is without pictures that could not be read: %d of the bank, %d of the queries",
                    name,
                    *lost.values(),
                )
        logger.info("results in %s", self.folder)

    def results(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """Return what results.json holds."""
        data, knn, retrieval = trainer.datamodule, _find(trainer, KNN), _find(trainer, Retrieval)
        captions, guards = _find(trainer, Captions), _find(trainer, Guards)
        plan = pl_module.plan.describe(pl_module)
        entries = knn.results if knn else {}
        return {
            **self.identity,
            "steps": trainer.global_step,
            "samples_seen": self.samples_seen,
            "seconds": round(self.seconds, 1),
            "parameters": {"total": plan["total"], "trained": plan["trained"]},
            "untouched": bool(getattr(pl_module, "untouched", False)),
            "captions": {
                "source": getattr(data, "source", None),
                "pairs": len(data.manifest),
                "manifest_sha256": data.manifest_sha256,
                "skipped": dict(sorted((self.skipped | data.skipped).items())),
            },
            "knn": entries,
            "task": self.task,
            "captioning": captions.results if captions else {},
            "retrieval": retrieval.results if retrieval else {},
            "summary": domain_means(entries) | domain_intervals(entries),
            "guards": guards.results if guards else {},
            "protocol": protocol_of(entries.values()),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on counting."""
        begun = bool(self._started)
        return {
            "samples_seen": self.samples_seen,
            "seconds": self.seconds + (time.perf_counter() - self._started) * begun,
            "processor_seconds": self.processor_seconds + (processor_seconds() - self._processor_started) * begun,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.samples_seen, self.seconds = state_dict["samples_seen"], state_dict["seconds"]
        self.processor_seconds = state_dict["processor_seconds"]
        self.skipped = dict(state_dict.get("skipped", {}))


def _find(trainer: lightning.Trainer, kind: type) -> Any:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def _boards(trainer: lightning.Trainer) -> list[TensorBoardLogger]:
    return [sink for sink in trainer.loggers if isinstance(sink, TensorBoardLogger)]


def _prominence(metric: str) -> int:
    """Return a metric's place among those that runs are judged by: changes at home and away, of sets, accuracies."""
    return next(place for place, start in enumerate(("summary/", "knn_delta/", "")) if metric.startswith(start))
