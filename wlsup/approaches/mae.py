"""MAE pretraining on pictures alone: where an encoder to start from is made, not an approach to compare."""

from __future__ import annotations

from torch import Tensor

from wlsup.approaches.base import Approach
from wlsup.batch import ImageBatch
from wlsup.errors import WlsupError
from wlsup.models.mae import DecoderSpec, build_mae
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.reconstruction import reconstruction_loss
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainPlan

__all__ = ["MAEPretraining"]


class MAEPretraining(Approach):
    """Reconstruct the patches that were masked; `wlsup pretrain` saves encoder and decoder for `build_vision`.

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners": AdamW with betas (0.9, 0.95), weight
    decay 0.05, ``lr = base_lr * batch / 256`` (stated here as the resulting ``lr``), cosine decay after warm-up.

    Args:
        encoder: the architecture; its weights are drawn afresh unless ``pretrained`` says otherwise.
        decoder: MAE's decoder.
        optimizer: optimizer and schedule.
        lr: of encoder and decoder, after warm-up.
        weight_decay: of matrices.
        mask_ratio: share of the patches removed.
    """

    name = "mae"
    summary = "MAE pretraining on pictures alone"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(pretrained=False),
        decoder: DecoderSpec = DecoderSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(),
        lr: float = 1.5e-4,
        weight_decay: float = 0.05,
        mask_ratio: float = 0.75,
    ) -> None:
        super().__init__(optimizer)
        if not 0 < mask_ratio < 1:
            raise WlsupError(f"mask_ratio must be in (0, 1), not {mask_ratio}.")
        self.lr, self.weight_decay, self.mask_ratio = lr, weight_decay, mask_ratio
        self.mae = build_mae(encoder, decoder)
        if not encoder.pretrained:
            self.mae.initialize()

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder in the making."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """All trains but the fixed position embeddings."""
        return TrainPlan([Freeze("mae.*pos_embed"), Train("mae.*", self.lr, self.weight_decay)])

    def losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Masked reconstruction."""
        warming = self.mae.warming_up()
        output = self.mae(batch.images, mask_ratio=self.mask_ratio, predict_kept=False, warming=warming)
        loss = reconstruction_loss(
            output.prediction, batch.images, output.mask, self.mae.patch_size, self.mae.normalize_pixels
        )
        return {"loss": loss, "reconstruction": loss}
