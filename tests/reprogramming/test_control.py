"""The training of what a run is compared with takes the run's steps, in its precision, and averages as the run does."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import nn

from wlsup.optim import OptimizerSpec
from wlsup.plan import Train, TrainPlan
from wlsup.reprogramming.control import StepsAlike, compared, train_alike

STEPS = 12


def trainer(precision=None, steps=STEPS, **options):
    run = {"gradient_clip_val": None, "gradient_clip_algorithm": None, "accumulate_grad_batches": 1, **options}
    return SimpleNamespace(
        estimated_stepping_batches=steps, global_step=steps, precision_plugin=precision or Precision(), **run
    )


def trained(ema):
    """Train one weight, and return it as it is after each step, as it is seen then, and as it is left."""
    part, weights, seen = nn.Linear(1, 1, bias=False), [], []
    nn.init.constant_(part.weight, 1.0)

    def losses(step):
        weights.append(float(part.weight))
        return [lambda: (part.weight - step).square().sum()]

    plan = TrainPlan([Train("*", 0.1)])
    train_alike(part, plan, OptimizerSpec(), trainer(), ema, losses, lambda step: seen.append(float(part.weight)))
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


def test_a_step_of_fewer_batches_weighs_them_as_the_others_do_as_lightning_does():
    part, gradients = nn.Linear(1, 1, bias=False), []
    part.weight.register_hook(lambda gradient: gradients.append(float(gradient)))
    plan, run = TrainPlan([Train("*", 0.1)]), trainer(steps=2, accumulate_grad_batches=2)
    train_alike(part, plan, OptimizerSpec(), run, 0.0, lambda step: [lambda: part.weight.sum()] * (2 - step))
    assert gradients == [0.5, 0.5, 0.5]


def gradient_of_a_step(losses, **options):
    """Return the gradients with which one step is taken, of weights that begin at 1."""
    part, seen = nn.Linear(2, 1, bias=False), []
    nn.init.constant_(part.weight, 1.0)
    steps = StepsAlike(part, TrainPlan([Train("*", 0.1)]), OptimizerSpec(), trainer(**options), 0.0)
    take = steps.optimizer.step
    steps.optimizer.step = lambda *args, **kwargs: (seen.append(part.weight.grad.clone()), take(*args, **kwargs))[1]
    for loss in losses:
        steps.add(lambda loss=loss: loss(part), of=len(losses))
    steps.step()
    assert part.weight.grad is None
    return seen, part.weight.detach()


def test_gradients_are_clipped_as_the_run_clipped_them():
    losses = [lambda part: (part.weight * torch.tensor([3.0, 0.4])).sum()]
    for algorithm, wanted in (("norm", [3.0, 0.4]), ("value", [1.0, 0.4])):
        (seen,), _ = gradient_of_a_step(losses, gradient_clip_val=1.0, gradient_clip_algorithm=algorithm)
        wanted = torch.tensor([wanted])
        assert torch.allclose(seen, wanted / wanted.norm() if algorithm == "norm" else wanted, atol=1e-5)


def test_losses_are_computed_in_the_runs_precision_and_averaged_over_the_batches_of_a_step():
    dtypes = []

    def loss(part):
        out = part(torch.tensor([[1.0, 2.0]]))
        dtypes.append(out.dtype)
        return out.float().sum()

    (seen,), _ = gradient_of_a_step(
        [loss, lambda part: 3 * part.weight.sum()], precision=MixedPrecision("bf16-mixed", "cpu")
    )
    assert dtypes == [torch.bfloat16]
    assert seen.tolist() == [[2.0, 2.5]]
    gradient_of_a_step([loss])
    assert dtypes[1:] == [torch.float32]


def test_where_the_run_scales_its_gradients_small_ones_survive_and_infinite_ones_are_skipped():
    fp16 = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    seen = []

    def tiny(part):
        part.weight.register_hook(lambda gradient: seen.append(float(gradient.abs().max())))
        return 1e-6 * part.weight.sum()

    (taken,), _ = gradient_of_a_step([tiny], precision=fp16)
    assert seen[0] == pytest.approx(1e-6 * 2**16, rel=1e-3)
    assert taken.flatten().tolist() == pytest.approx([1e-6, 1e-6], rel=1e-3)
    skipped, weight = gradient_of_a_step([lambda part: torch.inf * part.weight.sum()], precision=fp16)
    assert skipped == []
    assert weight.tolist() == [[1.0, 1.0]]


def test_a_comparison_that_fails_is_said_and_costs_the_run_nothing(caplog):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    assert compared(lambda: 3) == (3, "")
    assert not caplog.records
    result, said = compared(fails)
    assert result is None
    assert said.endswith("(OutOfMemoryError: CUDA out of memory.)")
    assert said in caplog.text

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(stopped)
