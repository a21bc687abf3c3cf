"""What a captioner says of held-out pictures: samples along the way, scores when it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from wlsup.batch import CaptionBatch
from wlsup.callbacks.progress import progress
from wlsup.callbacks.undisturbed import undisturbed
from wlsup.errors import WlsupError
from wlsup.evaluation.caption_pictures import caption_grid
from wlsup.evaluation.caption_table import samples_markdown
from wlsup.evaluation.captions import score_captions
from wlsup.evaluation.statistics import mean_over_pictures
from wlsup.sharding import has_shards

__all__ = ["Captioner", "Captions", "evaluate_captions"]


class Captioner(Protocol):
    """An approach that puts pictures into words."""

    def caption(self, images: Tensor) -> list[str]:
        """(B, 3, H, W) -> B captions, as the approach's ``generation`` says."""
        ...

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Return scalars by name, "captioning" among them where captions are learnt by their tokens."""
        ...


@dataclass
class _Samples:
    """Pictures that are shown again and again."""

    images: Tensor
    keys: list[str]
    references: list[list[str]]


def evaluate_captions(
    module: torch.nn.Module,
    batches: Sequence[CaptionBatch],
    references: dict[str, list[str]],
    *,
    resamples: int = 1000,
    samples: int = 0,
) -> dict[str, Any]:
    """Caption pictures and score it against all that people wrote of each; nothing outside is disturbed.

    The caption loss of a picture is the approach's own captioning loss, as in training but in eval mode, over all its
    human captions: nats a token. Its mean is over pictures.

    Args:
        module: a `Captioner`.
        batches: whole pictures; of their captions none is looked at.
        references: by key, at least one a picture.
        resamples: of the pictures, for the intervals.
        samples: how many of the first pictures' captions the result shows.

    Returns:
        `score_captions`' result, with the score "loss" and with "samples": [{"key", "generated", "references"}].

    Raises:
        WlsupError: there is no picture.
    """
    device = next(module.parameters()).device
    generated: dict[str, str] = {}
    losses: list[float] = []
    with undisturbed(module), progress("captions of held-out pictures") as show:
        for batch in batches:
            images = batch.images.to(device)
            generated.update(zip(batch.keys, module.caption(images), strict=True))
            for position, key in enumerate(batch.keys):
                loss = _caption_loss(module, images[position], key, references[key])
                losses += [] if loss is None else [loss]
            show(len(generated), len(references))
    truth = [references[key] for key in generated]
    results = score_captions(list(generated.values()), truth, resamples=resamples)
    if losses:
        mean, low, high = mean_over_pictures(losses, resamples=resamples)
        results["scores"]["loss"] = {"value": mean, "ci95": [low, high]}
    else:
        results["absent"]["loss"] = "this run's captioning loss has weight 0"
    shown = list(generated.items())[:samples]
    results["samples"] = [{"key": key, "generated": said, "references": references[key]} for key, said in shown]
    return results


def _caption_loss(module: torch.nn.Module, image: Tensor, key: str, captions: list[str]) -> float | None:
    torch.manual_seed(0)  # where the loss draws masks or modes, the same ones for every picture and every run
    many = len(captions)
    loss = module.losses(CaptionBatch(image.expand(many, -1, -1, -1), captions, [key] * many)).get("captioning")
    return None if loss is None else float(loss)


class Captions(Callback):
    """Score the captions of held-out pictures after training, and show a few of them along the way.

    For every approach that captions (it has `caption`); with others, and where no pairs are held out, nothing happens.

    Args:
        pictures: held-out pictures that are scored at most, chosen by a hash of their keys; 0 turns scoring off.
        samples: pictures shown in TensorBoard with generated and human captions; 0 shows none.
        every_n_epochs: show samples every so many epochs, beside the start and the end; 0 only there.
        bootstrap_resamples: of the pictures, for each score's 95 % interval.
    """

    def __init__(
        self, pictures: int = 128, samples: int = 4, every_n_epochs: int = 1, bootstrap_resamples: int = 1000
    ) -> None:
        if min(pictures, samples, every_n_epochs) < 0 or bootstrap_resamples < 1:
            raise WlsupError(
                "captioning.pictures, captioning.samples and captioning.every_n_epochs must be >= 0, and "
                "captioning.bootstrap_resamples >= 1."
            )
        self.pictures, self.samples, self.every_n_epochs = pictures, samples, every_n_epochs
        self.bootstrap_resamples = bootstrap_resamples
        self.results: dict[str, Any] = {}
        self._shown: _Samples | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show what the model says before step 1."""
        if not self.samples or not _captions_here(trainer, pl_module) or not _boards(trainer):
            return
        loader, references = trainer.datamodule.held_out(self.samples)
        batches = list(loader)
        if batches:
            keys = [key for batch in batches for key in batch.keys]
            images = torch.cat([batch.images for batch in batches])
            self._shown = _Samples(images, keys, [list(references[key]) for key in keys])
            self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show what it says now."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Score what it says when it is trained."""
        epochs = trainer.current_epoch
        if not self.every_n_epochs or epochs % self.every_n_epochs:
            self._show(trainer, pl_module)
        if not self.pictures or not _captions_here(trainer, pl_module):
            return
        loader, references = trainer.datamodule.held_out(self.pictures)
        if not references:
            return
        results = evaluate_captions(
            pl_module, loader, references, resamples=self.bootstrap_resamples, samples=max(self.samples, 4)
        )
        self.results = {"generation": _generation(pl_module), **results}
        metrics = {f"captioning/{name}": entry["value"] for name, entry in results["scores"].items()}
        for sink in trainer.loggers:
            sink.log_metrics(metrics, step=trainer.global_step)

    def _show(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._shown is None:
            return
        shown, spec = self._shown, pl_module.image_spec
        with undisturbed(pl_module):
            said = pl_module.caption(shown.images.to(pl_module.device))
        grid = caption_grid(shown.images, said, shown.references, spec.mean, spec.std)
        rows = zip(shown.keys, said, shown.references, strict=True)
        text = samples_markdown([{"key": k, "generated": g, "references": r} for k, g, r in rows])
        for board in _boards(trainer):
            board.experiment.add_image("captions", grid, trainer.global_step)
            board.experiment.add_text("captions", text, trainer.global_step)


def _captions_here(trainer: lightning.Trainer, module: lightning.LightningModule) -> bool:
    here = trainer.is_global_zero or has_shards(module)  # of a shared out model all processes compute
    return here and hasattr(module, "caption") and hasattr(trainer.datamodule, "held_out")


def _generation(module: lightning.LightningModule) -> str:
    """Say how captions were put into words: of a language model the method, of a decoder of its own the likeliest."""
    spec = getattr(module, "generation", None)
    return "likeliest words" if spec is None or getattr(module, "language", None) is None else spec.method


def _boards(trainer: lightning.Trainer) -> list[TensorBoardLogger]:
    return [sink for sink in trainer.loggers if isinstance(sink, TensorBoardLogger)]
