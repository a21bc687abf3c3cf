"""Ladder side tuning: a small network beside the frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from wlsup.adapters.ladder import Ladder
from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.models.mae import DecoderSpec
from wlsup.models.text import TextSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec, build_towers, pair_embeddings, two_branch_losses
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainIf, TrainPlan

__all__ = ["LadderSideTuning"]


class LadderSideTuning(Approach):
    """A frozen MAE beside which a small network reads every block and corrects the last one's output.

    No gradient goes through the encoder: it keeps no activation for the backward pass but what the side network reads.

    Source: Sung et al. 2022 (LST); He et al. 2022 (MAE); Radford et al. 2021 (contrastive loss). Ours are the residual
    form, an identity at step 0, and that captions condition the reconstruction through the side network.

    Args:
        encoder: the pretrained vision encoder.
        decoder: MAE's decoder, where the encoder's weights bring none.
        text: the frozen text encoder.
        objective: losses, their weights, mask ratio, caption dropout.
        optimizer: optimizer and schedule.
        regularizer: what holds the encoder near the pretrained one.
        lr: of all that trains, after warm-up.
        weight_decay: of matrices.
        reduction: the side network is so many times narrower than the encoder.
        embedding_width: channels of the condition embedding.
        form: "residual" (ours) or "replace" (the paper's, which begins without the pretrained features).
        layers: positions of the blocks that the side network reads; None: all.
        train_decoder: whether MAE's decoder trains, where it is used; by default only if it has no pretrained weights.
    """

    name = "lst"
    summary = "ladder side tuning: a small network beside the frozen encoder; no gradient through it"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        decoder: DecoderSpec = DecoderSpec(),
        text: TextSpec = TextSpec(),
        objective: ObjectiveSpec = ObjectiveSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        reduction: int = 8,
        embedding_width: int = 64,
        form: Literal["residual", "replace"] = "residual",
        layers: Sequence[int] | None = None,
        train_decoder: bool | None = None,
    ) -> None:
        super().__init__(optimizer, regularizer)
        self.objective, self.lr, self.weight_decay = objective, lr, weight_decay
        self.mae, self.text, self.head = build_towers(encoder, decoder, text, objective)
        self.adapter = Ladder(
            self.encoder.embed_dim,
            len(self.encoder.blocks),
            self.text.width,
            reduction=reduction,
            embedding_width=embedding_width,
            form=form,
            layers=layers,
        ).attach(self.encoder)
        self.identity_at_start = form == "residual"
        wanted = not self.mae.decoder_pretrained if train_decoder is None else train_decoder
        self.train_decoder = wanted and bool(objective.reconstruction_weight)

    @property
    def encoder(self) -> VisionEncoder:
        """The frozen vision encoder with its side network."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """The side network and the heads train; the encoder never does."""
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
