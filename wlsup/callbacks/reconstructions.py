"""A fixed grid of masked reconstructions: input, masked, prediction, pasted."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.evaluation.pictures import reconstruction_grid
from wlsup.objectives.reconstruction import unnormalize_patches, unpatchify

__all__ = ["Reconstructions"]


class Reconstructions(Callback):
    """Show, in TensorBoard, what the MAE makes of the same held-out pictures under the same masks.

    The encoder runs under the null condition, as in every evaluation. Approaches without an MAE show nothing.

    Args:
        pictures: rows of the grid; 0 turns it off.
        mask_ratio: share of the patches hidden.
    """

    def __init__(self, pictures: int = 6, mask_ratio: float = 0.75) -> None:
        if pictures < 0 or not 0 < mask_ratio < 1:
            raise WlsupError("reconstructions.pictures must be >= 0 and reconstructions.mask_ratio in (0, 1).")
        self.pictures, self.mask_ratio = pictures, mask_ratio
        self._images: Tensor | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the pretrained model's grid."""
        cached = getattr(trainer.datamodule, "cache_features", False)  # batches then hold features, not pictures
        if not self.pictures or not hasattr(pl_module, "mae") or cached:
            return
        images: list[Tensor] = []
        for batch in trainer.datamodule.val_dataloader():
            images.extend(batch.images[: self.pictures - len(images)])
            if len(images) == self.pictures:
                break
        if images:
            self._images = torch.stack(images)
            self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the grid as it is now."""
        self._show(trainer, pl_module)

    def _show(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        boards = [sink for sink in trainer.loggers if isinstance(sink, TensorBoardLogger)]
        if self._images is None or not boards or not trainer.is_global_zero:
            return
        mae, spec = pl_module.mae, pl_module.image_spec
        images = self._images.to(pl_module.device)
        patches = mae.encoder.grid_size[0] * mae.encoder.grid_size[1]
        noise = torch.rand(len(images), patches, generator=torch.Generator().manual_seed(0))
        training = pl_module.training
        mae.eval()
        with torch.inference_mode():
            output = mae(images, mask_ratio=self.mask_ratio, noise=noise.to(images.device))
            prediction = output.prediction.float()
            if mae.normalize_pixels:
                prediction = unnormalize_patches(prediction, images, mae.patch_size)
            predicted = unpatchify(prediction, mae.patch_size, tuple(images.shape[-2:]))
        pl_module.train(training)
        grid = reconstruction_grid(images, predicted, output.mask, mae.patch_size, spec.mean, spec.std)
        for board in boards:
            board.experiment.add_image("reconstructions", grid, trainer.global_step)
