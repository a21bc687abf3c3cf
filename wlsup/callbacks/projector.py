"""TensorBoard's embedding projector: the evaluation sets' pictures as the encoder sees them, before and after."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import Dataset, Subset

from wlsup.batch import EvalSet, ImageSpec
from wlsup.callbacks.progress import progress
from wlsup.callbacks.undisturbed import undisturbed
from wlsup.errors import WlsupError
from wlsup.evaluation.features import extract_features

__all__ = ["Projector"]

_SIDE = 32  # of a thumbnail: a sprite of 2,500 fits the 8,192 pixels that TensorBoard allows several times over


class Projector(Callback):
    """Log features of test pictures with their classes and thumbnails, before step 1 and at the end.

    Args:
        pictures: of each evaluation set, spread evenly over its test pictures; 0 turns it off.
        batch_size: pictures a forward pass.
    """

    def __init__(self, pictures: int = 0, batch_size: int = 256) -> None:
        if not 0 <= pictures <= 2500 or batch_size < 1:
            raise WlsupError(
                f"projector.pictures must lie in 0..2500 and projector.batch_size be at least 1, not {pictures} and "
                f"{batch_size}: a browser draws no more."
            )
        self.pictures, self.batch_size = pictures, batch_size

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log what the pretrained encoder sees; a resumed run has that already."""
        if not trainer.ckpt_path:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log what the fine-tuned one sees."""
        self._log(trainer, pl_module)

    def _log(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        boards = [sink for sink in trainer.loggers if isinstance(sink, TensorBoardLogger)]
        if not self.pictures or not boards or not trainer.is_global_zero:
            return
        for eval_set in trainer.datamodule.eval_datasets():
            features, names, thumbnails = self._features(module, eval_set)
            for board in boards:
                board.experiment.add_embedding(
                    features, names, thumbnails, global_step=trainer.global_step, tag=eval_set.name
                )

    def _features(self, module: lightning.LightningModule, eval_set: EvalSet) -> tuple[Tensor, list[str], Tensor]:
        chosen = spread(eval_set.test, self.pictures)
        with undisturbed(module), progress(f"projection of {eval_set.name}") as show:
            found = extract_features(
                module.features, chosen, batch_size=self.batch_size, device=module.device, progress=show
            )
        pictures = torch.stack([thumbnail(chosen[place][0], module.image_spec) for place in found.indices.tolist()])
        return found.features, [eval_set.class_names[label] for label in found.labels.tolist()], pictures


def spread(dataset: Dataset, count: int) -> Subset:
    """Return ``count`` items of a data set, evenly spread over it; all, where it has no more."""
    total = len(dataset)
    count = min(count, total)
    return Subset(dataset, [place * total // count for place in range(count)])


def thumbnail(picture: Tensor, spec: ImageSpec) -> Tensor:
    """Return a normalised (3, H, W) picture as (3, 32, 32) in [0, 1]."""
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (spec.std, spec.mean))
    whole = (picture * scale + shift).clamp(0, 1)
    size = (_SIDE, _SIDE)
    return torch.nn.functional.interpolate(whole[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
