"""The exponential moving average of what trains, and who sees it."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from wlsup.errors import WlsupError
from wlsup.moving_average import growing_decay

__all__ = ["EMA"]


class EMA(Callback):
    """Average what trains after each step t: ``a <- d_t a + (1 - d_t) theta``, with ``d_t = min(d, (1 + t)/(10 + t))``.

    Validation, k-NN, checkpoints (their ``state_dict``) and whatever is exported from them see the average; training
    goes on from the weights themselves, which a checkpoint holds beside it. Put it before the callbacks that evaluate.
    The decay d is ``regularizer.ema`` of the approach; at 0 this does nothing.

    Source: Polyak & Juditsky 1992 for averaging; Tarvainen & Valpola 2017 for an exponential one as the better model;
    the growing decay is TensorFlow's ``ExponentialMovingAverage(num_updates=t)``, without which a short run's average
    would be mostly its start.
    """

    def __init__(self) -> None:
        self.decay = 0.0
        self.steps = 0
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}  # not empty while the module shows the average
        self._seen = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Take the decay from the approach."""
        self.decay = pl_module.regularizer.spec.ema
        pl_module.regularizer.averaged = True

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin at the weights as they are, unless a checkpoint brought an average."""
        if self.decay:
            trained = _trained(pl_module)
            self._average = {n: self._average.get(n, p.detach()).to(p.device, copy=True) for n, p in trained.items()}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count from where the trainer stands."""
        self._seen = trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Go on from the weights themselves."""
        self._hide(pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, if an optimizer step was taken."""
        if not self.decay or trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        decay = growing_decay(self.decay, self.steps)
        self.steps += 1
        for name, parameter in _trained(pl_module).items():
            self._average[name].lerp_(parameter.detach(), 1 - decay)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the average."""
        self._show(pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the average to whoever evaluates next."""
        self._show(pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the average in the module: it is the result."""
        self._show(pl_module)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average where the weights go, and the weights beside it."""
        if not self.decay:
            return
        weights = self._raw or {name: p.detach() for name, p in _trained(pl_module).items()}
        checkpoint["ema"] = {"weights": {n: t.clone() for n, t in weights.items()}, "steps": self.steps}
        averages = {name: value.clone() for name, value in self._average.items() if name in checkpoint["state_dict"]}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **averages}

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the average from the weights that were loaded, and put the weights themselves in their place.

        Raises:
            WlsupError: the checkpoint was written with an average and the run has none.
        """
        saved = checkpoint.get("ema")
        if saved is None:
            return
        if not pl_module.regularizer.spec.ema:
            raise WlsupError(
                "This checkpoint holds an average of weights; the run has regularizer.ema = 0. Use the run's own "
                "config.yaml."
            )
        self.steps = saved["steps"]
        for name, parameter in _trained(pl_module).items():
            self._average[name] = parameter.detach().clone()
            parameter.copy_(saved["weights"][name])

    @torch.no_grad()
    def _show(self, module: lightning.LightningModule) -> None:
        if not self._average or self._raw:
            return
        for name, parameter in _trained(module).items():
            self._raw[name] = parameter.detach().clone()
            parameter.copy_(self._average[name])

    @torch.no_grad()
    def _hide(self, module: lightning.LightningModule) -> None:
        for name, parameter in _trained(module).items() if self._raw else ():
            parameter.copy_(self._raw[name])
        self._raw = {}


def _trained(module: lightning.LightningModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
