"""The training of what a run is compared with takes the run's steps, and averages weights as the run does."""

from types import SimpleNamespace

import pytest
from torch import nn

from wlsup.optim import OptimizerSpec
from wlsup.plan import Train, TrainPlan
from wlsup.reprogramming.control import train_alike

STEPS = 12


def trained(ema):
    """Train one weight, and return it as it is after each step, as it is seen then, and as it is left."""
    part, weights, seen = nn.Linear(1, 1, bias=False), [], []
    nn.init.constant_(part.weight, 1.0)

    def loss(step):
        weights.append(float(part.weight))
        return (part.weight - step).square().sum()

    trainer = SimpleNamespace(estimated_stepping_batches=STEPS, global_step=STEPS, gradient_clip_val=None)
    plan = TrainPlan([Train("*", 0.1)])
    train_alike(part, plan, OptimizerSpec(), trainer, ema, loss, lambda step: seen.append(float(part.weight)))
    return weights, seen, float(part.weight)


def test_with_an_average_the_result_is_the_average_and_the_steps_are_the_same():
    plain, seen, left = trained(0.0)
    assert [*plain[1:], left] == seen  # without it the weights themselves are seen
    averaged, shown, result = trained(0.5)
    assert averaged == plain
    average, wanted = plain[0], []
    for step, weight in enumerate([*plain[1:], left]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        wanted.append(average)
    assert shown == pytest.approx(wanted, abs=1e-6)
    assert result == pytest.approx(wanted[-1], abs=1e-6)
    assert abs(result - left) > 1e-3
