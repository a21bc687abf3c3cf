"""Training of a program outside of a run, to compare with: the same steps, schedule, clipping and averaging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wlsup.moving_average import MovingAverage
from wlsup.optim import OptimizerSpec, build_optimizer, build_schedule
from wlsup.plan import TrainPlan

__all__ = ["train_alike"]


def train_alike(
    parts: nn.Module,
    plan: TrainPlan,
    optimizer: OptimizerSpec,
    trainer: Any,
    ema: float,
    loss: Callable[[int], Tensor],
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train ``parts`` as a finished run trained its own.

    Args:
        parts: what trains, and nothing else.
        plan: over its parameters.
        optimizer: the run's.
        trainer: of the run: how many steps it took of how many, and how it clipped gradients.
        ema: decay of the average of weights, which is the result; 0: the weights are.
        loss: step -> the loss of a batch; torch's random state is seeded by the step before.
        after: called with each step taken; sees the average.
    """
    parts.requires_grad_(True)
    made = build_optimizer(optimizer, plan.parameter_groups(parts))
    schedule = build_schedule(optimizer, made, int(trainer.estimated_stepping_batches))
    average = MovingAverage(parts.parameters(), ema)
    for step in range(trainer.global_step):
        torch.manual_seed(step)
        made.zero_grad()
        loss(step).backward()
        if trainer.gradient_clip_val:
            nn.utils.clip_grad_norm_(parts.parameters(), trainer.gradient_clip_val)
        made.step()
        schedule.step()
        average.update()
        with average.shown():
            after(step)
    average.show()
