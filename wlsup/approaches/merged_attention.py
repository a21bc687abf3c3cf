"""Merged attention: image and caption tokens in one sequence, behind the blocks of a frozen encoder."""

from __future__ import annotations

from torch import Tensor

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.fusion.base import FusionSpec
from wlsup.fusion.merged import MergedFusion
from wlsup.models.mae import DecoderSpec
from wlsup.models.text import TextSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec, build_towers, pair_embeddings, two_branch_losses
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainIf, TrainPlan

__all__ = ["MergedAttentionApproach"]


class MergedAttentionApproach(Approach):
    """A frozen MAE with layers in which patches and caption words attend to everything, themselves included.

    Source: Hendricks et al. 2021 (merged attention); gates after Alayrac et al. 2022 (Flamingo); He et al. 2022 (MAE);
    Radford et al. 2021 (contrastive loss). The combination is the talk's "modality fusion strategies".

    Args:
        encoder: the pretrained vision encoder.
        decoder: MAE's decoder, where the encoder's weights bring none.
        text: the frozen text encoder.
        objective: losses, their weights, mask ratio, caption dropout.
        optimizer: optimizer and schedule.
        regularizer: what holds the encoder near the pretrained one.
        lr: of all that trains, after warm-up.
        weight_decay: of matrices.
        gate_lr: of the gates, single numbers that must come from 0 to order 1 in one run; higher than ``lr``.
        fusion: which reading of the strategy, where its layers go, and how wide they are.
        train_decoder: whether MAE's decoder trains, where it is used; by default only if it has no pretrained weights.
    """

    name = "merged_attention"
    summary = "merged attention: patches and caption words attend to one another in one sequence"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        decoder: DecoderSpec = DecoderSpec(),
        text: TextSpec = TextSpec(),
        objective: ObjectiveSpec = ObjectiveSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        gate_lr: float = 1e-2,
        fusion: FusionSpec = FusionSpec(kind="merged"),
        train_decoder: bool | None = None,
    ) -> None:
        super().__init__(optimizer, regularizer)
        self.objective, self.lr, self.weight_decay, self.gate_lr = objective, lr, weight_decay, gate_lr
        self.mae, self.text, self.head = build_towers(encoder, decoder, text, objective)
        self.fusion = MergedFusion(self.encoder.embed_dim, len(self.encoder.blocks), self.text.width, fusion)
        self.fusion.attach(self.encoder)
        wanted = not self.mae.decoder_pretrained if train_decoder is None else train_decoder
        self.train_decoder = wanted and bool(objective.reconstruction_weight)

    @property
    def encoder(self) -> VisionEncoder:
        """The frozen vision encoder with its fusion layers."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """The fusion layers and the heads train; the encoder never does."""
        decoder = [Freeze("mae.decoder.pos_embed"), Train("mae.decoder.*", self.lr, self.weight_decay)]
        return TrainPlan(
            [
                Train("fusion.*.g", self.gate_lr),
                Train("fusion.*", self.lr, self.weight_decay),
                TrainIf(self.objective.contrastive_weight, "head.*", self.lr, self.weight_decay),
                *(decoder if self.train_decoder else []),
                Freeze("mae.*"),
                Freeze("text.*"),
            ]
        )

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The pretrained vision and text encoders."""
        return {**super().bases, "text": self.text.base}

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Reconstruction under the caption, contrast under the null condition."""
        captions = self.text(batch.captions)
        return two_branch_losses(self.mae, self.head, batch.images, captions, self.objective, keys=batch.keys)

    def embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor] | None:
        """(B, E) pictures, under the null condition, and (B, E) captions; None where contrast has no weight."""
        return pair_embeddings(self.mae, self.head, self.text, batch, self.objective)
