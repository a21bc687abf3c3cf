"""Randomness that depends on the seed and the step alone, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

__all__ = ["KeyedRandomness"]


class KeyedRandomness(Callback):
    """Seed torch before every batch with a hash of (seed, stage, step, rank).

    Masks, caption dropout and dropout are then a pure function of where training stands, as the data's order and
    augmentation are: no random state needs to be saved. Validation draws the same masks every epoch.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed by the epoch and the batch within it."""
        self._seed("train", trainer.current_epoch, batch_idx, trainer.global_rank)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Seed by the batch alone."""
        self._seed("validation", 0, batch_idx, trainer.global_rank)

    def _seed(self, *key: str | int) -> None:
        digest = hashlib.sha256("/".join(map(str, (self.seed, *key))).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little"))
