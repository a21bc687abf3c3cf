"""Full fine-tuning: every weight of the encoder trains, with nothing added to it."""

from __future__ import annotations

from torch import Tensor

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.models.mae import DecoderSpec
from wlsup.models.text import TextSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec, build_towers, pair_embeddings, two_branch_losses
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainIf, TrainPlan

__all__ = ["Full"]


class Full(Approach):
    """The whole encoder learns to match pictures and captions: what a user would try first.

    The objective is the contrastive loss alone, between the encoder's feature of the full picture and a frozen text
    encoder's of the caption, each through a linear head that trains too. `ObjectiveSpec.reconstruction_weight` above 0
    adds masked reconstruction, whose decoder then trains as well: that is `mae_cl` under other defaults.

    Source: Radford et al. 2021 (CLIP), equation of figure 3, or Zhai et al. 2023 (SigLIP); fine-tuning with the loss of
    pretraining by pairs as in Goyal et al. 2023 (FLYP). The text encoder stays frozen, so that what changes is vision.

    Args:
        encoder: the pretrained vision encoder.
        decoder: MAE's decoder, where the encoder's weights bring none; used if reconstruction has a weight.
        text: the frozen text encoder.
        objective: losses, their weights, mask ratio.
        optimizer: optimizer and schedule.
        regularizer: what holds the encoder near the pretrained one.
        lr: of the heads, after warm-up.
        weight_decay: of matrices.
        encoder_lr: of the pretrained encoder (and decoder, unless that is fresh), lower than that of the fresh heads.

    Raises:
        WlsupError: a share of captions to drop, of which none is told.
    """

    name = "full"
    summary = "full fine-tuning of the encoder with a contrastive loss, nothing added"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        decoder: DecoderSpec = DecoderSpec(),
        text: TextSpec = TextSpec(),
        objective: ObjectiveSpec = ObjectiveSpec(reconstruction_weight=0.0),
        optimizer: OptimizerSpec = OptimizerSpec(),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        encoder_lr: float = 1e-4,
    ) -> None:
        super().__init__(optimizer, regularizer)
        objective.refuse("caption_dropout", because="the encoder is told no caption, so there is none to drop")
        self.objective, self.lr, self.weight_decay, self.encoder_lr = objective, lr, weight_decay, encoder_lr
        self.mae, self.text, self.head = build_towers(encoder, decoder, text, objective)

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """Encoder and heads train, and the decoder if it is used; the text encoder is frozen."""
        decoder = Train("mae.decoder.*", self.mae.decoder_lr(self.encoder_lr, self.lr), self.weight_decay)
        return TrainPlan(
            [
                TrainIf(self.objective.contrastive_weight, "head.*", self.lr, self.weight_decay),
                Freeze("mae.*pos_embed"),
                Train("mae.encoder.*", self.encoder_lr, self.weight_decay),
                decoder if self.objective.reconstruction_weight else Freeze("mae.decoder.*"),
                Freeze("text.*"),
            ]
        )

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The pretrained vision and text encoders."""
        return {**super().bases, "text": self.text.base}

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Contrast, and masked reconstruction where it has a weight."""
        captions = self.text(batch.captions)
        return two_branch_losses(self.mae, self.head, batch.images, captions, self.objective, keys=batch.keys)

    def embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor] | None:
        """(B, E) pictures and (B, E) captions; None where contrast has no weight."""
        return pair_embeddings(self.mae, self.head, self.text, batch, self.objective)
