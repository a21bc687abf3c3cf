"""Optimizer and learning-rate schedule. What trains, and each group's learning rate and weight decay, is the plan's.

The schedule is a factor in [0, 1] on each group's own learning rate, so that groups keep their ratio. It is stepped
after every optimizer step; t counts those from 0. With w warm-up steps and T = total_steps - 1, the last step:

    t < w       in a line from ``warmup_start_ratio`` at 0 to 1 at w - 1
    t = w       1
    w < t <= T  from 1 to ``min_lr_ratio`` at T: a cosine, a line, or 1 all along
    t > T       as at T

It is the shape of lightning-bolts' LinearWarmupCosineAnnealingLR, whoever computes it: ``scheduler_library`` changes
the code that runs, not the numbers (to the rounding of fp64).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from wlsup.errors import WlsupError, choose
from wlsup.sharding import any_sliced

__all__ = ["OptimizerSpec", "build_optimizer", "build_schedule"]

_OPTIMIZERS = ("adamw", "sgd", "lars", "bolts_lars")
_SCHEDULES = ("cosine", "linear", "constant", "bolts_cosine")
_LIBRARIES = ("timm", "torch", "bolts")


@dataclass(frozen=True)
class OptimizerSpec:
    """Which optimizer and which schedule.

    Args:
        name: "adamw"; "sgd"; "lars" (You et al. 2017, timm's); "bolts_lars" (lightning-bolts', the extra ``bolts``).
        betas: AdamW's decay rates of the two moments, each in [0, 1).
        eps: added to the denominator by AdamW and LARS.
        momentum: of SGD and LARS, in [0, 1).
        trust_coefficient: LARS's eta, the ratio of update to weight norm before the learning rate.
        schedule: "cosine", "linear" or "constant" after warm-up; "bolts_cosine" is "cosine" by lightning-bolts.
        scheduler_library: who computes the schedule: "timm", "torch", or "bolts" (cosine only; the extra ``bolts``).
        warmup_steps: optimizer steps of warm-up; None means ``warmup_fraction`` of all steps.
        warmup_fraction: share of all steps, in [0, 1).
        warmup_start_ratio: factor on the learning rate at the first step, in [0, 1], if there is warm-up.
        min_lr_ratio: factor on the learning rate at the last step, in [0, 1].

    Raises:
        WlsupError: a value is out of its range.
    """

    name: Literal["adamw", "sgd", "lars", "bolts_lars"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    schedule: Literal["cosine", "linear", "constant", "bolts_cosine"] = "cosine"
    scheduler_library: Literal["timm", "torch", "bolts"] = "timm"
    warmup_steps: int | None = None
    warmup_fraction: float = 0.05
    warmup_start_ratio: float = 0.0
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        choose("optimizer", self.name, _OPTIMIZERS)
        choose("schedule", self.schedule, _SCHEDULES)
        choose("scheduler library", self.scheduler_library, _LIBRARIES)
        ranges = {
            "betas[0]": (self.betas[0], 0 <= self.betas[0] < 1, "[0, 1)"),
            "betas[1]": (self.betas[1], 0 <= self.betas[1] < 1, "[0, 1)"),
            "eps": (self.eps, self.eps >= 0, "[0, inf)"),
            "momentum": (self.momentum, 0 <= self.momentum < 1, "[0, 1)"),
            "trust_coefficient": (self.trust_coefficient, self.trust_coefficient > 0, "(0, inf)"),
            "warmup_steps": (self.warmup_steps, self.warmup_steps is None or self.warmup_steps >= 0, "0, 1, 2, ..."),
            "warmup_fraction": (self.warmup_fraction, 0 <= self.warmup_fraction < 1, "[0, 1)"),
            "warmup_start_ratio": (self.warmup_start_ratio, 0 <= self.warmup_start_ratio <= 1, "[0, 1]"),
            "min_lr_ratio": (self.min_lr_ratio, 0 <= self.min_lr_ratio <= 1, "[0, 1]"),
        }
        for name, (given, valid, allowed) in ranges.items():
            if not valid:
                raise WlsupError(f"optimizer.{name} must be in {allowed}, not {given}.")
        if self.scheduler_library == "bolts" and self.schedule not in ("cosine", "bolts_cosine"):
            raise WlsupError(
                f"scheduler_library bolts computes the cosine schedule only, not {self.schedule!r}. "
                "Choose scheduler_library timm or torch for it."
            )

    def warmup(self, total_steps: int) -> int:
        """Return the number of warm-up steps out of ``total_steps``.

        Raises:
            WlsupError: ``warmup_steps`` leaves no step to fall in.
        """
        most = max(0, total_steps - 2)
        if self.warmup_steps is None:
            return min(round(self.warmup_fraction * total_steps), most)
        if self.warmup_steps > most:
            raise WlsupError(
                f"optimizer.warmup_steps is {self.warmup_steps}, but the run has {total_steps} steps, which leave room "
                f"for at most {most}. Lower it, or set optimizer.warmup_fraction instead."
            )
        return self.warmup_steps


def build_optimizer(spec: OptimizerSpec, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer.

    Source: AdamW, Loshchilov & Hutter 2019, algorithm 2; LARS, You et al. 2017, equation 6. The two LARS take the same
    steps, except for a parameter whose gradient is all zeros: timm's decays it at the full learning rate, bolts' leaves
    it. In groups without weight decay neither scales anything: there they are SGD with momentum.

    Args:
        spec: which one.
        groups: dictionaries with ``params``, ``lr``, ``weight_decay`` and, kept for logs, ``name``.

    Raises:
        WlsupError: nothing trains; or the library that was named is not installed.
    """
    if not any(group["params"] for group in groups):
        raise WlsupError(
            "There is nothing to optimize: the plan trains no parameter. `wlsup inspect APPROACH` prints it."
        )
    # torch's products over lists of tensors cannot hold slices of shared out tensors beside whole ones.
    together = {"foreach": False} if any_sliced(p for group in groups for p in group["params"]) else {}
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, betas=tuple(spec.betas), eps=spec.eps, **together)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=groups[0]["lr"], momentum=spec.momentum, **together)
    lars = {"lr": groups[0]["lr"], "momentum": spec.momentum, "eps": spec.eps}
    if spec.name == "bolts_lars":
        return _bolts().LARS(groups, trust_coefficient=spec.trust_coefficient, **lars)
    from timm.optim import Lars

    return Lars(groups, trust_coeff=spec.trust_coefficient, **lars)


def build_schedule(spec: OptimizerSpec, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """Make the schedule, to be stepped once after each optimizer step.

    It never goes past its end. lightning-bolts' class does: its learning rate climbs again after ``max_epochs``, on the
    second half of the cosine's period. Nor is that class driven per epoch, which would keep the whole first epoch at
    ``warmup_start_lr``: what it calls epochs are the optimizer's steps here.

    Source: SGDR, Loshchilov & Hutter 2017, equation 5, without restarts.

    Args:
        spec: shape, and who computes it.
        optimizer: its groups' learning rates are the ones at the top of the schedule.
        total_steps: optimizer steps of the whole run, >= 1.

    Returns:
        A scheduler of torch's. Its state dictionary holds the step it is at: resuming is exact.

    Raises:
        WlsupError: too many warm-up steps, no steps at all, or the library that was named is not installed.
    """
    if total_steps < 1:
        raise WlsupError(
            f"A schedule needs at least one step; the run has {total_steps}. Check the data and max_steps."
        )
    warmup, last = spec.warmup(total_steps), total_steps - 1
    library = "bolts" if spec.schedule == "bolts_cosine" else spec.scheduler_library
    build = {"timm": _timm_factor, "torch": _torch_factor, "bolts": _bolts_factor}[library]
    factor = build(spec, warmup, last) if last > 0 else lambda t: 1.0

    # A function, not an object: LambdaLR would put an object's attributes into the checkpoint.
    def held(t: int) -> float:
        return 1.0 if t == warmup else factor(min(t, last))

    return LambdaLR(optimizer, held)


def _torch_factor(spec: OptimizerSpec, warmup: int, last: int) -> Callable[[int], float]:
    """The factor by the formula in the module's text."""

    def factor(t: int) -> float:
        if t < warmup:
            return spec.warmup_start_ratio + (1 - spec.warmup_start_ratio) * t / max(1, warmup - 1)
        if spec.schedule == "constant":
            return 1.0
        progress = (t - warmup) / (last - warmup)
        height = (1 + math.cos(math.pi * progress)) / 2 if spec.schedule == "cosine" else 1 - progress
        return spec.min_lr_ratio + (1 - spec.min_lr_ratio) * height

    return factor


def _unit_optimizer() -> torch.optim.Optimizer:
    """An optimizer of nothing with learning rate 1: a library's schedule on it is the factor."""
    return torch.optim.SGD([torch.zeros(1)], lr=1.0)


def _timm_factor(spec: OptimizerSpec, warmup: int, last: int) -> Callable[[int], float]:
    """The factor by timm, whose own lower bound and warm-up start are absolute, the same for all groups."""
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler

    unit = _unit_optimizer()
    warm = {
        "warmup_t": max(0, warmup - 1),
        "warmup_lr_init": spec.warmup_start_ratio,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    span = last - warmup
    if spec.schedule == "cosine":
        scheduler = CosineLRScheduler(unit, t_initial=span, lr_min=spec.min_lr_ratio, **warm)
    elif spec.schedule == "linear":
        scheduler = PolyLRScheduler(unit, t_initial=span, power=1.0, lr_min=spec.min_lr_ratio, **warm)
    else:
        scheduler = StepLRScheduler(unit, decay_t=last + 1, decay_rate=1.0, **warm)

    def factor(t: int) -> float:
        if warmup == 1 and t == 0:
            return spec.warmup_start_ratio
        # timm begins to fall where its warm-up ends; here the learning rate is at the top for two steps, w - 1 and w.
        scheduler.step_update(t if t < warmup else t - min(1, warmup))
        return unit.param_groups[0]["lr"]

    return factor


def _bolts_factor(spec: OptimizerSpec, warmup: int, last: int) -> Callable[[int], float]:
    """The factor by lightning-bolts, whose class only goes forward, each value following from the one before."""
    unit = _unit_optimizer()
    scheduler = _bolts().LinearWarmupCosineAnnealingLR(
        unit,
        warmup_epochs=warmup,
        max_epochs=last,
        warmup_start_lr=spec.warmup_start_ratio if warmup else 1.0,
        eta_min=spec.min_lr_ratio,
    )
    values = [unit.param_groups[0]["lr"]]

    def factor(t: int) -> float:
        while len(values) <= t:
            unit.step()
            scheduler.step()
            values.append(unit.param_groups[0]["lr"])
        return values[t]

    return factor


def _bolts() -> Any:
    """Return `pl_bolts.optimizers`.

    Raises:
        WlsupError: lightning-bolts is not installed, or not able to be imported beside what is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of every function of its own that is "under review"
            from pl_bolts import optimizers
    except (ImportError, AttributeError) as error:
        raise WlsupError(
            f"optimizer names lightning-bolts, which cannot be imported here ({error}). It needs pytorch-lightning < 2 "
            "and setuptools < 81, so give it an environment of its own: python -m venv .venv-bolts && "
            ".venv-bolts/bin/pip install '.[bolts]' -c constraints-bolts.txt. Or set optimizer.scheduler_library to "
            "timm, optimizer.schedule to cosine and optimizer.name to lars, which compute the same."
        ) from error
    return optimizers
