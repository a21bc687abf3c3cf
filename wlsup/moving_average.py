"""The exponential moving average of weights, for whoever trains outside of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import Parameter

__all__ = ["MovingAverage", "growing_decay"]


def growing_decay(decay: float, step: int) -> float:
    """Return ``min(d, (1 + t) / (10 + t))``: without it a short run's average would be mostly its start.

    Source: TensorFlow's ``ExponentialMovingAverage(num_updates=t)``.
    """
    return min(decay, (1 + step) / (10 + step))


class MovingAverage:
    """``a <- d_t a + (1 - d_t) theta`` after each step t, as `callbacks.ema.EMA` does for a run.

    Source: Polyak & Juditsky 1992; Tarvainen & Valpola 2017.

    Args:
        parameters: whose average it is, from their values now.
        decay: d; at 0 the average is the weights themselves.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._parameters = list(parameters)
        self._values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        decay = growing_decay(self.decay, self.steps)
        self.steps += 1
        for value, parameter in zip(self._values, self._parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def show(self) -> None:
        """Put the average where the weights are."""
        for value, parameter in zip(self._values, self._parameters, strict=True):
            parameter.copy_(value)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the average within the block, and the weights again after it."""
        weights = [parameter.detach().clone() for parameter in self._parameters]
        self.show()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, parameter in zip(weights, self._parameters, strict=True):
                    parameter.copy_(weight)
