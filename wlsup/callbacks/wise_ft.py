"""WiSE-FT's curve when training ends, from where it started; and of a finished run, the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from wlsup.batch import EvalSet
from wlsup.callbacks.knn import KNN
from wlsup.callbacks.progress import progress
from wlsup.callbacks.run_folder import RunFolder
from wlsup.callbacks.undisturbed import undisturbed
from wlsup.errors import WlsupError
from wlsup.evaluation.figures.saving import save_figure
from wlsup.evaluation.figures.wise_ft import draw_wise_ft
from wlsup.evaluation.wise_ft import ALPHAS, check_alphas
from wlsup.evaluation.wise_ft_curve import wise_ft_curve
from wlsup.evaluation.wise_ft_table import wise_ft_markdown, wise_ft_text
from wlsup.files import write_json

__all__ = ["WiseFT", "curve_of_run", "write_curve"]

logger = logging.getLogger("wlsup")


def curve_of_run(
    module: torch.nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    sets: Sequence[EvalSet],
    **options: Any,
) -> dict[str, Any]:
    """Return `wise_ft_curve` of an approach, with what is known about its start.

    Args:
        module: an `Approach`, whose ``start`` remembers the tensors at step 0.
        start: those tensors.
        end: the tensors after training.
        sets: to score.
        options: of `wise_ft_curve`.

    Raises:
        WlsupError: the approach leaves the encoder as it is, or the start is not the run's own.
    """
    refuse_no_line(module)
    known = module.start.check(module)
    if not known:
        logger.warning(
            "this run's checkpoint does not say where training started (it is of an older version): the start is the "
            "one that its configuration and seed make here, unchecked"
        )
    with undisturbed(module):
        curve = wise_ft_curve(
            module, start, end, sets, held=module.start.held, progress=progress, warn=logger.warning, **options
        )
    return {**curve, "start": {"sha256": module.start.sha256 or None, "checked": known}}


def refuse_no_line(module: torch.nn.Module) -> None:
    """Refuse an approach from which no line leads to the pretrained encoder.

    Raises:
        WlsupError: it leaves the encoder as it is, or does not begin as the pretrained encoder.
    """
    if module.untouched:
        raise WlsupError(
            f"Approach {module.name!r} leaves the encoder as it was pretrained, so that both ends of WiSE-FT's curve "
            "are one encoder and there is no curve. Give a run of an approach that trains the encoder."
        )
    if not module.identity_at_start:
        raise WlsupError(
            f"Approach {module.name!r}, as configured, does not begin as the pretrained encoder, so that no line leads "
            "from that encoder to it and there is no curve. (`lst` has one with model.form residual.)"
        )


def write_curve(curve: Mapping[str, Any], folder: Path, title: str) -> list[Path]:
    """Write wise_ft.json, wise_ft.png and wise_ft.svg.

    Raises:
        WlsupError: the folder cannot be written.
    """
    try:
        write_json(folder / "wise_ft.json", curve)
    except OSError as error:
        raise WlsupError(f"Cannot write {folder / 'wise_ft.json'}: {error.strerror}. Give another folder.") from error
    return [folder / "wise_ft.json", *save_figure(draw_wise_ft(curve, title), folder / "wise_ft")]


class WiseFT(Callback):
    """Score the encoder along the straight line from where training started to where it ended.

    Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT).

    Args:
        enabled: off by default: it costs as much as the k-NN of as many encoders as there are alphas.
        alphas: places on the line, 0 and 1 among them.
        k: of the k-NN vote; None: the run's own, of its k-NN table.
        temperature: of the vote; None: likewise.
        batch_size: pictures a forward pass.
        num_workers: loader processes.
        bootstrap_resamples: of the test pictures, for each change's 95 % interval.
        probe: also score by a linear probe.
    """

    def __init__(
        self,
        enabled: bool = False,
        alphas: Sequence[float] = ALPHAS,
        k: int | None = None,
        temperature: float | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        bootstrap_resamples: int = 10_000,
        probe: bool = False,
    ) -> None:
        self.enabled, self.alphas = enabled, check_alphas(alphas)
        self.vote = {name: value for name, value in (("k", k), ("temperature", temperature)) if value is not None}
        self.options: dict[str, Any] = {"batch_size": batch_size}
        self.options |= {"num_workers": num_workers, "resamples": bootstrap_resamples, "probe": probe}
        self.results: dict[str, Any] = {}

    @property
    def reads_whole_weights(self) -> bool:
        """Whether slices of shared out weights are of no use to it."""
        return self.enabled

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Have the approach remember where training starts; refuse one that has no line."""
        if self.enabled and stage == "fit":
            refuse_no_line(pl_module)
            pl_module.start.keep = True

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuse, before it has trained for long, a resumed run whose start cannot be made again."""
        if self.enabled:
            pl_module.start.check(pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the curve, write it into the run's folder and show it in TensorBoard."""
        if not self.enabled or not trainer.is_global_zero:
            return
        sets = trainer.datamodule.eval_datasets()
        if not sets:
            logger.warning("wise_ft: this run has no eval_sets, so there is nothing to score")
            return
        state = pl_module.state_dict()
        end = {name: state[name].detach().clone() for name in pl_module.start.tensors}
        start = pl_module.start.tensors
        knn = next((one for one in trainer.callbacks if isinstance(one, KNN)), KNN())
        options = self.options | {"k": knn.k, "temperature": knn.temperature} | self.vote
        self.results = curve_of_run(pl_module, start, end, sets, alphas=self.alphas, **options)
        title = f"WiSE-FT: {pl_module.name}"
        for callback in trainer.callbacks:
            if isinstance(callback, RunFolder):
                identity = callback.identity
                title = f"WiSE-FT: {pl_module.name}, {identity['preset']}, seed {identity['seed']}"
                write_curve(self.results, callback.folder, title)
        _show(trainer, self.results, title)
        logger.info("%s", wise_ft_text(self.results, title))


def _show(trainer: lightning.Trainer, curve: Mapping[str, Any], title: str) -> None:
    chosen = curve["alphas"].index(curve["chosen_alpha"])
    metrics = {"wise_ft/chosen_alpha": curve["chosen_alpha"]}
    for name, means in curve["summary"].items():
        if means:
            metrics[f"wise_ft/{name}_delta"] = means["delta"][chosen]
    for sink in trainer.loggers:
        sink.log_metrics(metrics, step=trainer.global_step)
    for board in trainer.loggers:
        if isinstance(board, TensorBoardLogger):
            for name, entry in curve["sets"].items():
                for alpha, accuracy in zip(curve["alphas"], entry["accuracy"], strict=True):
                    # The axis is alpha in percent: TensorBoard draws the curve by itself.
                    board.experiment.add_scalar(f"wise_ft/{name}", accuracy, round(100 * alpha))
            board.experiment.add_image("wise_ft", _pixels(draw_wise_ft(curve, title)), trainer.global_step)
            board.experiment.add_text("wise_ft", wise_ft_markdown(curve, title), trainer.global_step)


def _pixels(figure: Any) -> Tensor:
    """Return a figure as (3, H, W) uint8."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(110)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba()))[..., :3].permute(2, 0, 1)
