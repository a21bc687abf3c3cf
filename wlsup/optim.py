"""Temporary stand-in; helper CONTRASTIVE owns this file and replaces it."""

from dataclasses import dataclass
import math, torch


@dataclass(frozen=True)
class OptimizerSpec:
    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: str = "cosine"
    warmup_fraction: float = 0.1


def build_optimizer(spec, groups):
    return torch.optim.AdamW(groups, betas=spec.betas)


def build_schedule(spec, optimizer, total_steps):
    w = max(1, int(spec.warmup_fraction * total_steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / w if t < w else 0.5 * (1 + math.cos(math.pi * (t - w) / max(1, total_steps - w)))
    )
