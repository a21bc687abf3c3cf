"""Evaluating in the middle of a training that must not notice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from wlsup.ranks import alone

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Evaluate on rank 0 without a trace: eval mode, no gradients; modes and all random states are put back after."""
    device = next(module.parameters()).device
    modes = [(child, child.training) for child in module.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    module.eval()
    try:
        with alone(), torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for child, training in modes:
            child.training = training
