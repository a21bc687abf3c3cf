"""FiLM adapters in a frozen encoder, conditioned on language."""

from __future__ import annotations

from torch import Tensor

from wlsup.adapters.film import FiLM
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

__all__ = ["FilmApproach"]


class FilmApproach(Approach):
    """A frozen MAE whose activations a caption scales and shifts.

    Source: Perez et al. 2018 (FiLM); He et al. 2022 (MAE); Radford et al. 2021 (contrastive loss). The combination is
    the talk's "Approach 2 + adapters".

    Args:
        encoder: the pretrained vision encoder.
        decoder: MAE's decoder, where the encoder's weights bring none.
        text: the frozen text encoder.
        objective: losses, their weights, mask ratio, caption dropout.
        optimizer: optimizer and schedule.
        regularizer: what holds the encoder near the pretrained one.
        lr: of all that trains, after warm-up.
        weight_decay: of matrices.
        embedding_width: channels of the condition embedding that every site's generator reads.
        top: how many of the last blocks get the adapter; None: all.
        train_decoder: whether MAE's decoder trains, where it is used; by default only if it has no pretrained weights.
    """

    name = "film"
    summary = "FiLM adapters: captions scale and shift a frozen encoder's channels"

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
        embedding_width: int = 64,
        top: int | None = None,
        train_decoder: bool | None = None,
    ) -> None:
        super().__init__(optimizer, regularizer)
        self.objective, self.lr, self.weight_decay = objective, lr, weight_decay
        self.mae = build_mae(encoder, decoder)
        self.text = TextEncoder(text)
        self.head = ContrastiveHead(
            self.encoder.embed_dim, self.text.width, objective.projection_width, objective.contrastive
        )
        self.adapter = FiLM(
            self.encoder.embed_dim, len(self.encoder.blocks), self.text.width, embedding_width=embedding_width, top=top
        ).attach(self.encoder)
        wanted = not self.mae.decoder_pretrained if train_decoder is None else train_decoder
        self.train_decoder = wanted and bool(objective.reconstruction_weight)

    @property
    def encoder(self) -> VisionEncoder:
        """The frozen vision encoder with its adapter."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """The adapter and the heads train; the encoder never does."""
        decoder = [Freeze("mae.decoder.pos_embed"), Train("mae.decoder.*", self.lr, self.weight_decay)]
        return TrainPlan(
            [
                Train("adapter.*", self.lr, self.weight_decay),
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
