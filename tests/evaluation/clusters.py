"""Labelled features of overlapping classes, for probes and few shots."""

from __future__ import annotations

import torch

from wlsup.evaluation.features import Features


def clusters(n: int, width: int = 12, classes: int = 4, noise: float = 1.5, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    rows = torch.nn.functional.normalize(centres[labels] + noise * torch.randn(n, width, generator=generator), dim=1)
    return Features(rows, labels, torch.arange(n))
