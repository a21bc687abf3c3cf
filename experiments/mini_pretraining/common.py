"""What the recipes share: captions to train on, the learning rate's course, progress lines, half-precision saving."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wlsup.data.mini import mini_captions

__all__ = ["Progress", "caption_groups", "decayed", "halve", "learning_rate"]

# Seeds far from those a user would take for training scenes.
_TEXT_SEED = 770_000


def caption_groups(scenes: int, split: str = "train") -> list[list[str]]:
    """Captions of ``scenes`` scenes, one list a scene; the pictures are not used."""
    return mini_captions(split, scenes, _TEXT_SEED).captions


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Linear warm-up over a share of the steps, then half a cosine to 0."""
    begin = max(1, int(warmup * steps))
    if step < begin:
        return peak * (step + 1) / begin
    return peak * 0.5 * (1 + math.cos(math.pi * (step - begin) / max(1, steps - begin)))


def decayed(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Optimizer groups: matrices decay, biases and norms do not."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Progress:
    """Progress lines with a smoothed loss, speed and the time still to go.

    Args:
        name: of the part that trains.
        steps: in all.
        every: steps between lines.
    """

    def __init__(self, name: str, steps: int, every: int = 100) -> None:
        self.name, self.steps, self.every = name, steps, every
        self.begin = time.perf_counter()
        self.smooth: dict[str, float] = {}

    def update(self, step: int, **losses: Tensor) -> None:
        """Take in a step's losses (from step 0) and print every so often."""
        for key, value in losses.items():
            before = self.smooth.get(key, value.item())
            self.smooth[key] = 0.98 * before + 0.02 * value.item()
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            seconds = time.perf_counter() - self.begin
            left = seconds / (step + 1) * (self.steps - step - 1)
            values = "  ".join(f"{key} {value:.4f}" for key, value in self.smooth.items())
            print(f"{self.name} {step + 1}/{self.steps}  {values}  {seconds:.0f} s, {left:.0f} s to go", flush=True)


def halve(path: Path) -> None:
    """Store a safetensors file's floating tensors as fp16."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def seed_everything(seed: int) -> torch.Generator:
    """Seed torch and return a generator of its own for the order of samples."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
