"""Asymmetric attention: only one of picture and caption asks the other, behind the blocks of a frozen encoder."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.fusion.asymmetric import AsymmetricFusion
from wlsup.fusion.base import FusionSpec
from wlsup.models.mae import DecoderSpec
from wlsup.models.text import TextSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.matching import MatchingSpec, matching_loss
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec, build_towers, pair_embeddings, two_branch_losses
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainIf, TrainPlan

__all__ = ["AsymmetricAttentionApproach"]


class AsymmetricAttentionApproach(Approach):
    """A frozen MAE with layers in which one stream asks the other, and is never asked back.

    ``fusion.kind`` says who asks.

    "asymmetric_image": the picture asks the caption, which never sees a picture. Captions condition the reconstruction
    branch, as in every conditioned approach, and the contrastive branch runs under the null condition.

    "asymmetric_text": the caption asks the picture, which never sees a caption, under any condition: what is hooked
    into the encoder are gated feed-forwards of its own. So nothing can leak, and language reaches the encoder only in
    the gradient. The contrastive loss brings what a whole caption says about a whole picture; but then the attention
    would serve no one. Its use is a third loss, matching: the words look at the picture's tokens at every fusion layer,
    and from what they found it is judged which of a few captions belongs to it. The right caption and the wrong ones
    are judged by the same function, so that there is no short cut (a caption that conditioned the picture would be
    one), and the gradient asks each patch token to hold what the words look for. The text asks the picture of the
    contrastive branch or, where that is left out, the patches that the reconstruction branch left visible.

    Source: Hendricks et al. 2021 (asymmetric attention); Li et al. 2021 (ALBEF: matching by a text stream that looks at
    the picture); gates after Alayrac et al. 2022 (Flamingo); He et al. 2022 (MAE); Radford et al. 2021 (contrastive
    loss). The combination, and a choice among several captions in place of a yes or no, are ours.

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
        matching: weight and negatives of the matching loss; only with "asymmetric_text", where null means the defaults.
        train_decoder: whether MAE's decoder trains, where it is used; by default only if it has no pretrained weights.

    Raises:
        WlsupError: an option that the chosen reading does not read: matching, or what is done with absent captions.
    """

    name = "asymmetric_attention"
    summary = "asymmetric attention: patches ask the caption, or the caption the patches, not both"

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
        fusion: FusionSpec = FusionSpec(kind="asymmetric_image"),
        matching: MatchingSpec | None = None,
        train_decoder: bool | None = None,
    ) -> None:
        super().__init__(optimizer, regularizer)
        self.objective, self.lr, self.weight_decay, self.gate_lr = objective, lr, weight_decay, gate_lr
        self.mae, self.text, self.head = build_towers(encoder, decoder, text, objective)
        self.fusion = AsymmetricFusion(self.encoder.embed_dim, len(self.encoder.blocks), self.text.width, fusion)
        self.fusion.attach(self.encoder)
        if matching is not None and self.fusion.image_sees_text:
            raise WlsupError(
                "matching goes with fusion.kind asymmetric_text only: with asymmetric_image the caption never looks at "
                "the picture. Leave matching out, or set the kind."
            )
        self.matching = None if self.fusion.image_sees_text else matching or MatchingSpec()
        if self.matching is not None:
            objective.refuse("micro_batch", because="matching looks at the whole batch's passes")
            objective.refuse("caption_dropout", because="with asymmetric_text the picture never looks at a caption")
            if fusion.null_tokens != FusionSpec.null_tokens:
                raise WlsupError(
                    "with asymmetric_text the picture never looks at a caption, so none is ever absent: leave "
                    "fusion.null_tokens out."
                )
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
        """Reconstruction, contrast under the null condition, and matching where the text asks."""
        captions = self.text(batch.captions)
        with self.fusion.recording() as passes:
            losses = two_branch_losses(self.mae, self.head, batch.images, captions, self.objective, keys=batch.keys)
        if self.matching is None:
            return losses
        matching = matching_loss(partial(self.fusion.score, passes[-1]), captions, self.matching.negatives, batch.keys)
        return {**losses, "matching": matching, "loss": losses["loss"] + self.matching.weight * matching}

    def embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor] | None:
        """(B, E) pictures, under the null condition, and (B, E) captions; None where contrast has no weight."""
        return pair_embeddings(self.mae, self.head, self.text, batch, self.objective)
