"""Held-out retrieval: how far contrastive training is above chance on pairs it never saw."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from wlsup.evaluation.retrieval import PROTOCOL, retrieval_hits, retrieval_intervals

__all__ = ["Retrieval"]


class Retrieval(Callback):
    """Collect the embeddings of the validation pairs and log recall at 1, 5 and 10 beside the chance level.

    Approaches without a shared image-text space, or whose objective does not teach it, return no embeddings, and
    nothing is logged.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.results: dict[str, Any] = {}

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's embeddings."""
        if outputs is not None:
            self._pairs.append(tuple(part.detach().float().cpu() for part in outputs))

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log recall over all held-out pairs."""
        if not self._pairs:
            return
        image, text = (torch.cat(part) for part in zip(*self._pairs, strict=True))
        self._pairs.clear()
        hits = retrieval_hits(image, text)
        recall = {name: {k: float(each.mean()) for k, each in by_k.items()} for name, by_k in hits.items()}
        self.results = {"pairs": len(image), **recall, "ci95": retrieval_intervals(hits), "protocol": PROTOCOL}
        metrics = {
            f"retrieval/{direction}_R@{k}": value
            for direction in ("image_to_text", "text_to_image")
            for k, value in recall[direction].items()
        }
        pl_module.log_dict(metrics, sync_dist=True)
