"""Spectra of the weights before step 1, along training and after: WeightWatcher's figures, off by default."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from wlsup.callbacks.progress import progress
from wlsup.callbacks.run_folder import RunFolder
from wlsup.errors import WlsupError
from wlsup.evaluation.spectra import LayerSpectrum, SpectraSpec, spectra, spectra_report
from wlsup.evaluation.spectra_files import write_spectra
from wlsup.evaluation.watcher import watcher_version
from wlsup.evaluation.weight_views import LeftOut, WeightView, weight_views

__all__ = ["Spectra", "along_entry", "chosen_views", "had_before", "matching"]

logger = logging.getLogger("wlsup")


def matching(views: Sequence[WeightView], layers: str) -> list[WeightView]:
    """Return the views whose name, or its end after a dot, matches a glob.

    Args:
        views: of one model.
        layers: such as ``blocks.*.mlp.*`` or ``adapter.*``.

    Raises:
        WlsupError: none does.
    """
    found = [view for view in views if _matches(view.name, layers)]
    if not found:
        some = ", ".join(view.name for view in views[:: max(1, len(views) // 4)][:5])
        raise WlsupError(f"No layer matches {layers!r}. There are {len(views)}, such as {some}.")
    return found


def chosen_views(
    module: torch.nn.Module, layers: str | None = None, *, fused: bool = False
) -> tuple[list[WeightView], list[LeftOut]]:
    """Return an approach's views: its encoder's and all that train, or what a glob names.

    Args:
        module: an approach, its plan known.
        layers: a glob over all layers, frozen language models and text encoders too; None: as said.
        fused: as in `weight_views`.

    Returns:
        The views, and what is left out of the parts that are looked at; frozen parts as one entry each.

    Raises:
        WlsupError: the glob matches nothing.
    """
    views, left_out = weight_views(module, fused=fused)
    if layers is not None:
        return matching(views, layers), [left for left in left_out if _matches(left.name, layers)]
    trained, encoder = set(module.plan.trained_names(module)), encoder_prefix(module)
    chosen = [view for view in views if view.name.startswith(encoder) or trained.intersection(view.sources)]
    chosen_names = {view.name for view in chosen}
    frozen: dict[str, int] = {}
    for view in views:
        if view.name not in chosen_names:
            part = view.name.split(".")[0]
            frozen[part] = frozen.get(part, 0) + 1
    left_out = [left for left in left_out if left.name.startswith(encoder) or left.name in trained]
    why = "frozen, and not of the encoder: name them by a glob to see them"
    return chosen, left_out + [LeftOut(f"{part}: {count} layers", why) for part, count in frozen.items()]


def encoder_prefix(module: torch.nn.Module) -> str:
    """Return what the names of an approach's encoder begin with."""
    encoder = module.encoder
    return next(f"{name}." for name, part in module.named_modules() if part is encoder)


def had_before(module: torch.nn.Module, views: Sequence[WeightView]) -> list[WeightView]:
    """Return the views that were there before training: the encoder's weights. What was added to it was not."""
    prefix = encoder_prefix(module)
    return [view for view in views if view.name.startswith(prefix) and not view.update]


def along_entry(step: int, epoch: int, found: dict[str, LayerSpectrum]) -> dict[str, Any]:
    """Return one entry of spectra.json's "along": each layer's figures at a step."""
    keys = ("alpha", "fitted_alpha", "sigma", "D", "tail", "log_norm", "power_law", "why")
    layers = {name: {key: spectrum.metrics[key] for key in keys} for name, spectrum in found.items()}
    return {"step": step, "epoch": epoch, "layers": layers}


class Spectra(Callback):
    """Analyse the weights by WeightWatcher: the encoder's before step 1, and with all that trains at the end.

    Off unless asked for. Works on rank 0, on the CPU, in float64; the model is not touched. Writes spectra.json and its
    pictures into the run's folder, and logs ``spectra/alpha`` and ``spectra/power_law`` (the share of layers that have
    one) of the layers that were there before, and ``spectra_alpha/<layer>`` of all. The mean alpha is of layers with a
    power law both before and now; ``spectra/alpha_before`` is what the same layers had before.

    Args:
        enabled: analyse at all.
        every_n_epochs: also along the way, every so many epochs; 0 only before and after.
        min_evals: eigenvalues that a fit needs.
        randomize: compare with shuffled entries, before and after.
        layers: a glob over layers; None: the encoder's and all that train.

    Raises:
        WlsupError: a value out of its range, or weightwatcher is not installed.
    """

    def __init__(
        self,
        enabled: bool = False,
        every_n_epochs: int = 0,
        min_evals: int = 50,
        randomize: bool = True,
        layers: str | None = None,
    ) -> None:
        if every_n_epochs < 0:
            raise WlsupError(f"spectra.every_n_epochs must be >= 0, not {every_n_epochs}.")
        self.enabled, self.every_n_epochs, self.layers = enabled, every_n_epochs, layers
        self.spec = SpectraSpec(min_evals=min_evals, randomize=randomize)
        self.before: dict[str, LayerSpectrum] = {}
        self.along: list[dict[str, Any]] = []

    @property
    def reads_whole_weights(self) -> bool:
        """Whether slices of shared out weights are of no use to it."""
        return self.enabled

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Find out before training, not after it, whether weightwatcher is there."""
        if self.enabled:
            watcher_version()

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Analyse the pretrained encoder, unless a checkpoint brought its spectra."""
        if not self._here(trainer) or self.before:
            return
        if trainer.ckpt_path:
            logger.warning("spectra: the checkpoint has none of before training, so spectra.json will have none")
            return
        views, _ = chosen_views(pl_module, self.layers)
        self.before = self._analyse(had_before(pl_module, views), self.spec, "spectra before training")
        self._log(trainer, self.before)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Analyse along the way, where asked; without the random orders."""
        epoch = trainer.current_epoch + 1
        if not self._here(trainer) or not self._due(epoch) or epoch == trainer.max_epochs:
            return
        views, _ = chosen_views(pl_module, self.layers)
        spec = SpectraSpec(min_evals=self.spec.min_evals, randomize=False)
        found = self._analyse(views, spec, f"spectra after epoch {epoch}")
        self.along.append(along_entry(trainer.global_step, epoch, found))
        self._log(trainer, found)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Analyse what was trained, and write it all down."""
        if not self._here(trainer):
            return
        views, left_out = chosen_views(pl_module, self.layers)
        after = self._analyse(views, self.spec, "spectra after training")
        self._log(trainer, after)
        if self._due(trainer.current_epoch) and trainer.current_epoch == trainer.max_epochs:
            self.along.append(along_entry(trainer.global_step, trainer.current_epoch, after))
        folder = next((callback.folder for callback in trainer.callbacks if isinstance(callback, RunFolder)), None)
        if folder is None:
            return
        columns = {"before": self.before, "after": after}
        report = spectra_report(views, columns, left_out, self.spec)
        if self.along:
            report["along"] = self.along
        with progress("pictures of spectra") as show:
            write_spectra(folder, report, columns, title=f"{pl_module.name}: alpha by depth", progress=show)

    def state_dict(self) -> dict[str, Any]:
        """The spectra before training, which a resumed run cannot take again, and those along the way."""
        before = {
            name: {"eigenvalues": torch.from_numpy(np.array(spectrum.eigenvalues)), "metrics": spectrum.metrics}
            for name, spectrum in self.before.items()
        }
        return {"before": before, "along": self.along}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.along = list(state_dict["along"])
        self.before = {
            name: LayerSpectrum(entry["eigenvalues"].numpy(), entry["metrics"])
            for name, entry in state_dict["before"].items()
        }

    def _due(self, epoch: int) -> bool:
        return bool(self.every_n_epochs) and epoch % self.every_n_epochs == 0

    def _here(self, trainer: lightning.Trainer) -> bool:
        return self.enabled and trainer.is_global_zero

    def _analyse(self, views: Sequence[WeightView], spec: SpectraSpec, what: str) -> dict[str, LayerSpectrum]:
        with progress(what) as show:
            return spectra(views, spec, show)

    def _log(self, trainer: lightning.Trainer, found: dict[str, LayerSpectrum]) -> None:
        now, before = _alphas(found), _alphas(self.before)
        metrics = {f"spectra_alpha/{name}": alpha for name, alpha in now.items()}
        known = [name for name in found if name in self.before] if self.before else list(found)
        lawful = [name for name in known if name in now]
        both = [name for name in lawful if name in before] if self.before else lawful
        if both:
            metrics["spectra/alpha"] = sum(now[name] for name in both) / len(both)
        if both and self.before:
            metrics["spectra/alpha_before"] = sum(before[name] for name in both) / len(both)
        metrics["spectra/power_law"] = len(lawful) / max(len(known), 1)
        for sink in trainer.loggers:
            sink.log_metrics(metrics, step=trainer.global_step)


def _alphas(found: dict[str, LayerSpectrum]) -> dict[str, float]:
    return {name: spectrum.metrics["alpha"] for name, spectrum in found.items() if spectrum.metrics["power_law"]}


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name, f"*.{glob}")
