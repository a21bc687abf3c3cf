"""Randomness that depends on the seed and the step alone, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from wlsup.draws import share, unshare

__all__ = ["KeyedRandomness"]


class KeyedRandomness(Callback):
    """Seed torch before every batch with a hash of (seed, stage, step, rank); what ranks share with one without rank.

    Masks, caption dropout and dropout are then a pure function of where training stands, as the data's order and
    augmentation are: no random state needs to be saved. Validation, of which every rank sees all, draws the same masks
    every epoch and on every rank.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed by the epoch and the batch within it."""
        where = ("train", trainer.current_epoch, batch_idx)
        share(self._key(*where))
        torch.manual_seed(self._key(*where, trainer.global_rank))

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Seed by the batch alone."""
        unshare()
        torch.manual_seed(self._key("validation", 0, batch_idx, 0))

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """End the shared stream: what comes after the run is not one of its steps."""
        unshare()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """End it there too."""
        unshare()

    def _key(self, *key: str | int) -> int:
        digest = hashlib.sha256("/".join(map(str, (self.seed, *key))).encode()).digest()
        return int.from_bytes(digest[:8], "little")
