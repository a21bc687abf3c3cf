"""Training outside of a run, to compare with it: the same steps, schedule, precision, clipping and averaging."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wlsup.moving_average import MovingAverage
from wlsup.optim import OptimizerSpec, build_optimizer, build_schedule
from wlsup.plan import TrainPlan

__all__ = ["StepsAlike", "compared", "train_alike"]

_log = logging.getLogger("wlsup")
_T = TypeVar("_T")


class StepsAlike:
    """Steps of other parts, as a finished run took those of its own.

    Args:
        parts: what trains, and nothing else.
        plan: over its parameters.
        optimizer: the run's.
        trainer: of the run: how many steps there were to be, in which precision, and how it clipped gradients.
        ema: decay of the average of weights; 0: the weights are the average.
    """

    def __init__(self, parts: nn.Module, plan: TrainPlan, optimizer: OptimizerSpec, trainer: Any, ema: float) -> None:
        parts.requires_grad_(True)
        self.trainer = trainer
        self.parameters = list(parts.parameters())
        self.optimizer = build_optimizer(optimizer, plan.parameter_groups(parts))
        self.schedule = build_schedule(optimizer, self.optimizer, int(trainer.estimated_stepping_batches))
        self.average = MovingAverage(self.parameters, ema)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=scaled)

    def add(self, loss: Callable[[], Tensor], of: int) -> None:
        """Add the gradient of one of ``of`` losses, whose mean the step is to lower, computed as the run computes."""
        with self.trainer.precision_plugin.forward_context():
            share = loss() / of
        self._scaler.scale(share).backward()

    def step(self) -> None:
        """Take one step with the gradients that are there."""
        self._scaler.unscale_(self.optimizer)
        if limit := self.trainer.gradient_clip_val:
            by_value = self.trainer.gradient_clip_algorithm == "value"
            (nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_)(self.parameters, limit)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.average.update()


def train_alike(
    parts: nn.Module,
    plan: TrainPlan,
    optimizer: OptimizerSpec,
    trainer: Any,
    ema: float,
    losses: Callable[[int], Iterable[Callable[[], Tensor]]],
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train ``parts`` as a finished run trained its own.

    Args:
        parts: what trains, and nothing else.
        plan: over its parameters.
        optimizer: the run's.
        trainer: of the run: how many steps it took of how many, of how many batches, and how.
        ema: decay of the average of weights, which is the result; 0: the weights are.
        losses: step -> what computes the loss of each of its batches; the step seeds torch's random state before.
        after: called with each step taken; sees the average.
    """
    steps = StepsAlike(parts, plan, optimizer, trainer, ema)
    for step in range(trainer.global_step):
        torch.manual_seed(step)
        for loss in losses(step):
            steps.add(loss, of=trainer.accumulate_grad_batches)  # as Lightning does, also where an epoch ends early
        steps.step()
        with steps.average.shown():
            after(step)
    steps.average.show()


def compared(measure: Callable[[], _T]) -> tuple[_T | None, str]:
    """Return what a comparison measures and nothing, or, where it fails, nothing and what to say of it, with a warning.

    The run that is compared is done by then, and is not to lose its results by what only stands beside them.
    """
    try:
        return measure(), ""
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        said = f"The comparison failed and is left out ({type(error).__name__}: {reason})"
        _log.warning("%s.", said)
        return None, said
