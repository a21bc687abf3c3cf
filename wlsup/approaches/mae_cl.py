"""MAE and a contrastive loss with a frozen text encoder: the whole vision encoder trains."""

from __future__ import annotations

from torch import Tensor

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.models.heads import ContrastiveHead
from wlsup.models.mae import DecoderSpec, build_mae
from wlsup.models.text import TextEncoder, TextSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec, pair_embeddings, two_branch_losses
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainIf, TrainPlan

__all__ = ["MaeCL"]


class MaeCL(Approach):
    """Masked reconstruction and contrast with captions, in the whole encoder (the talk's "Approach 2").

    Source: He et al. 2022 (MAE); Radford et al. 2021 (InfoNCE) or Zhai et al. 2023 (SigLIP).

    Args:
        encoder: the pretrained vision encoder.
        decoder: MAE's decoder, where the encoder's weights bring none.
        text: the frozen text encoder.
        objective: losses, their weights, mask ratio; no caption is told, so there is none to drop.
        optimizer: optimizer and schedule.
        regularizer: what holds the encoder near the pretrained one.
        lr: of all that trains, after warm-up.
        weight_decay: of matrices.
        encoder_lr: of the pretrained encoder, and decoder unless that is fresh, lower than that of the fresh heads.

    Raises:
        WlsupError: a share of captions to drop, of which none is told.
    """

    name = "mae_cl"
    summary = "MAE plus a contrastive loss with a frozen text encoder; the whole encoder trains"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        decoder: DecoderSpec = DecoderSpec(),
        text: TextSpec = TextSpec(),
        objective: ObjectiveSpec = ObjectiveSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        encoder_lr: float = 1e-4,
    ) -> None:
        super().__init__(optimizer, regularizer)
        objective.refuse("caption_dropout", because="the encoder is told no caption, so there is none to drop")
        self.objective, self.lr, self.weight_decay = objective, lr, weight_decay
        self.mae = build_mae(encoder, decoder)
        self.text = TextEncoder(text)
        self.head = ContrastiveHead(
            self.encoder.embed_dim, self.text.width, objective.projection_width, objective.contrastive
        )
        self.encoder_lr = encoder_lr

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """Encoder, decoder and heads train; only the text encoder is frozen."""
        return TrainPlan(
            [
                TrainIf(self.objective.contrastive_weight, "head.*", self.lr, self.weight_decay),
                Freeze("mae.*pos_embed"),
                Train("mae.encoder.*", self.encoder_lr, self.weight_decay),
                TrainIf(
                    self.objective.reconstruction_weight,
                    "mae.decoder.*",
                    self.mae.decoder_lr(self.encoder_lr, self.lr),
                    self.weight_decay,
                ),
                Freeze("text.*"),
            ]
        )

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The pretrained vision and text encoders."""
        return {**super().bases, "text": self.text.base}

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Masked reconstruction and contrast."""
        captions = self.text(batch.captions)
        return two_branch_losses(self.mae, self.head, batch.images, captions, self.objective, keys=batch.keys)

    def embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor] | None:
        """(B, E) pictures and (B, E) captions; None where contrast has no weight."""
        return pair_embeddings(self.mae, self.head, self.text, batch, self.objective)
