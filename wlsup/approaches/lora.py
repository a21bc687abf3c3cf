"""Low-rank updates of a frozen encoder's weights, through peft."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.models.lora import LowRank, without_low_rank
from wlsup.models.mae import DecoderSpec
from wlsup.models.text import TextSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec, build_towers, pair_embeddings, two_branch_losses
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainIf, TrainPlan

__all__ = ["Lora"]


class Lora(Approach):
    """A frozen encoder whose linear layers each learn an update of low rank.

    Source: Hu et al. 2022 (LoRA), by peft's own layers; on every linear layer of a block, as Dettmers et al. 2023
    (QLoRA) found best. The objective is `full`'s: contrastive, and masked reconstruction where it has a weight.

    Args:
        encoder: the pretrained vision encoder.
        decoder: MAE's decoder, where the encoder's weights bring none; used, frozen if pretrained, if reconstruction
            has a weight.
        text: the frozen text encoder.
        objective: losses, their weights, mask ratio.
        optimizer: optimizer and schedule.
        regularizer: what holds the encoder near the pretrained one.
        lr: of all that trains, after warm-up.
        weight_decay: of matrices.
        rank: of each update.
        alpha: an update's scale is ``alpha / rank``.
        targets: which linear layers of each block.
        rslora: scale by ``alpha / sqrt(rank)`` instead.

    Raises:
        WlsupError: a share of captions to drop, of which none is told.
    """

    name = "lora"
    summary = "LoRA (through peft): low-rank updates of a frozen encoder, contrastive loss"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        decoder: DecoderSpec = DecoderSpec(),
        text: TextSpec = TextSpec(),
        objective: ObjectiveSpec = ObjectiveSpec(reconstruction_weight=0.0),
        optimizer: OptimizerSpec = OptimizerSpec(),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] = ("qkv", "proj", "fc1", "fc2"),
        rslora: bool = False,
    ) -> None:
        super().__init__(optimizer, regularizer)
        objective.refuse("caption_dropout", because="the encoder is told no caption, so there is none to drop")
        self.objective, self.lr, self.weight_decay = objective, lr, weight_decay
        mae, text_encoder, self.head = build_towers(encoder, decoder, text, objective)
        # Before the encoder that holds the same tensors: a parameter's name is the first under which it is found.
        self.lora = LowRank(mae.encoder.backbone, rank, alpha, targets, rslora)
        self.mae, self.text = mae, text_encoder
        self.train_decoder = bool(objective.reconstruction_weight) and not mae.decoder_pretrained
        # WiSE-FT blends the update, not its factors: with A held and B from 0 to B, it is alpha times the merged one.
        self.start.held = ("lora.*.A.weight",)

    @property
    def encoder(self) -> VisionEncoder:
        """The frozen vision encoder with its updates."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """The updates and the heads train; the encoder's own weights never do."""
        decoder = [Freeze("mae.decoder.pos_embed"), Train("mae.decoder.*", self.lr, self.weight_decay)]
        return TrainPlan(
            [
                Train("lora.*", self.lr, self.weight_decay),
                TrainIf(self.objective.contrastive_weight, "head.*", self.lr, self.weight_decay),
                *(decoder if self.train_decoder else []),
                Freeze("mae.*"),
                Freeze("text.*"),
            ]
        )

    def pretrained(self) -> VisionEncoder:
        """Return a copy of the encoder without the updates."""
        return without_low_rank(self.encoder)

    def merged(self) -> VisionEncoder:
        """Return a copy with every update added to the weights: a plain encoder that computes the same features."""
        return without_low_rank(self.encoder, merge=True)

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
