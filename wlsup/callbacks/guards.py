"""What keeps one bad batch from ruining a run: steps without finite gradients are skipped, loss spikes are told."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.sharding import gradient_norm

__all__ = ["Guards", "spike_limit"]

logger = logging.getLogger("wlsup")

_NORMAL = 1.4826  # of a normal distribution, the standard deviation over the median absolute deviation
_LEAST = 0.02  # of the median: losses that hardly vary are not full of spikes


def spike_limit(losses: deque[float] | list[float], deviations: float) -> float:
    """Return what a loss must exceed to be a spike: median + deviations * s of the losses before it.

    s is 1.4826 times their median absolute deviation from the median, which neither earlier spikes nor a slow descent
    widen much, and at least 2 % of the median.

    Args:
        losses: the last ones, finite, at least one.
        deviations: how many s.
    """
    middle = statistics.median(losses)
    spread = _NORMAL * statistics.median(abs(loss - middle) for loss in losses)
    return middle + deviations * max(spread, _LEAST * abs(middle))


class Guards(Callback):
    """Skip steps whose loss or gradient is not finite, and count loss spikes; a healthy run is not changed by a bit.

    After the first backward pass each tensor that is to train must have a gradient; otherwise it is told, or, where the
    processes of DistributedDataParallel would wait for it, refused.

    A skipped step has its gradients removed before the optimizer sees them, so that neither weights nor moments change,
    not even by weight decay. It is decided after the ranks' gradients are averaged, alike on all of them. In
    ``16-mixed`` precision the gradient scaler skips steps of its own while it looks for its scale: those whose loss is
    finite and whose scale is 1 or more are the scaler's, and are counted apart.

    Args:
        patience: end the run after so many skipped steps in a row.
        deviations: a loss is a spike above the median of the last ones by so many deviations; see `spike_limit`. Spikes
            are reported, and trained on. 0: do not look for spikes.
        window: how many losses before it a loss is compared with; no spike is told before there are so many.

    Raises:
        WlsupError: a value out of its range.
    """

    def __init__(self, patience: int = 20, deviations: float = 8.0, window: int = 32) -> None:
        if patience < 1 or deviations < 0 or window < 2:
            raise WlsupError(
                "guards need patience >= 1, deviations >= 0 and window >= 2, not "
                f"{patience}, {deviations:g} and {window}."
            )
        self.patience, self.deviations = patience, deviations
        self.skipped = self.spikes = self.scaled = self.in_a_row = 0
        self._recent: deque[float] = deque(maxlen=window)
        self._finite: Tensor | None = None  # of the losses since the last step
        self._skipping = self._looked = False

    @property
    def results(self) -> dict[str, int]:
        """What results.json says of a run."""
        counts = {"skipped_steps": self.skipped, "spikes": self.spikes}
        return counts | ({"scaler_skips": self.scaled} if self.scaled else {})

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        """Note whether the loss is finite; with accumulation, of all batches of the step."""
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """See, once, that the loss reached each tensor that is to train.

        Raises:
            WlsupError: it did not, and the processes of the run would wait for one another's gradients.
        """
        plan = None if self._looked else getattr(pl_module, "plan", None)
        self._looked = True
        trained = [one for one in plan.resolve(pl_module) if one.rule.trains] if plan is not None else []
        without = [one.name for one in trained if one.parameter.grad is None]
        if not without:
            return
        said = f"No loss reached {len(without)} tensors that are to train in the first step, such as {without[0]}"
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise WlsupError(
                f"{said}; the processes would wait for their gradients. Use --trainer.strategy "
                "ddp_find_unused_parameters_true, or losses that reach them."
            )
        logger.warning("%s.", said)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the gradients away if the step must not be taken."""
        loss_ok = True if self._finite is None else bool(self._finite)
        self._finite = None
        if trainer.world_size > 1:  # a loss may be bad on one rank only; the averaged gradients are all alike
            loss_ok = trainer.strategy.reduce_boolean_decision(loss_ok, all=True)
        gradients_ok = _finite_norm(optimizer)
        self._skipping = not (loss_ok and gradients_ok)
        if not self._skipping:
            self.in_a_row = 0
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if loss_ok and scaler is not None and scaler.get_scale() >= 1:
            self.scaled += 1  # its scale was too large, and it lowers it
        else:
            self._skip(trainer, "loss" if not loss_ok else "gradient")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look for a spike."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        skipping, self._skipping = self._skipping, False
        if not self.deviations or not isinstance(loss, Tensor):
            return
        value = float(loss)
        if not math.isfinite(value):
            return
        if len(self._recent) == self._recent.maxlen and not skipping:
            limit = spike_limit(self._recent, self.deviations)
            if value > limit:
                self.spikes += 1
                middle = statistics.median(self._recent)
                if trainer.is_global_zero:
                    _say(self.spikes, "step %d: the loss spiked to %.4g (median of late %.4g, limit %.4g)",
                         trainer.global_step, value, middle, limit)  # fmt: skip
                self._log(trainer)
        self._recent.append(value)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        counts = {"skipped": self.skipped, "spikes": self.spikes, "scaled": self.scaled, "in_a_row": self.in_a_row}
        return counts | {"recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        for name in ("skipped", "spikes", "scaled", "in_a_row"):
            setattr(self, name, state_dict[name])
        self._recent.clear()
        self._recent.extend(state_dict["recent"])

    def _skip(self, trainer: lightning.Trainer, what: str) -> None:
        self.skipped += 1
        self.in_a_row += 1
        if trainer.is_global_zero:
            _say(self.skipped, "step %d: the %s is not finite; the step is skipped (%d so far)",
                 trainer.global_step + 1, what, self.skipped)  # fmt: skip
        self._log(trainer)
        if self.in_a_row >= self.patience:
            raise WlsupError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite, so the run ends at step "
                f"{trainer.global_step + 1}: the weights no longer give finite numbers, or the data do not. Lower the "
                "learning rate, lengthen the warm-up, clip (trainer.gradient_clip_val), or use trainer.precision "
                "bf16-mixed or 32-true; guards.patience says how many steps are tolerated."
            )

    def _log(self, trainer: lightning.Trainer) -> None:
        metrics = {"guards/skipped_steps": float(self.skipped), "guards/spikes": float(self.spikes)}
        for sink in trainer.loggers:
            sink.log_metrics(metrics, step=trainer.global_step)


def _finite_norm(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the norm of all gradients is finite: one wait for the device."""
    norm = gradient_norm(parameter for group in optimizer.param_groups for parameter in group["params"])
    return norm is None or bool(torch.isfinite(norm))


def _say(count: int, message: str, *values: Any) -> None:
    """Warn of the first few, and then more and more rarely: of the 1st to 5th, the 10th, the 20th, the 40th, ..."""
    if count <= 5 or (count % 10 == 0 and (count // 10) & (count // 10 - 1) == 0):
        logger.warning(message, *values)
