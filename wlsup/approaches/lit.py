"""Locked image tuning: the encoder stays as it is, and captions are mapped to meet it."""

from __future__ import annotations

from itertools import chain

from torch import Tensor

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.models.mae import DecoderSpec
from wlsup.models.text import TextSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec, build_towers, contrast
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainPlan

__all__ = ["Lit"]


class Lit(Approach):
    """A locked encoder, and two linear heads that learn to match its features and those of captions.

    What language can be read off the encoder as it is: the yardstick for approaches that change it. Its k-NN accuracy
    cannot move, by design; retrieval is its result.

    Source: Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image text Tuning", which trains the text tower. From
    a few thousand pairs we train its projection alone, and the picture's: ours.

    Args:
        encoder: the pretrained vision encoder, locked.
        decoder: MAE's decoder, where the encoder's weights bring none; only shown, never trained.
        text: the text encoder, frozen.
        objective: of which the contrastive part is used.
        optimizer: optimizer and schedule.
        regularizer: of the encoder; its terms are 0 by design here, ema averages the heads.
        lr: of the heads, after warm-up.
        weight_decay: of matrices.

    Raises:
        WlsupError: reconstruction has a weight, or the contrastive branch sees masked pictures: the one would teach a
            locked encoder nothing, the other would make it compute its features again every epoch; or another option of
            ``objective`` is set that is not read here.
    """

    name = "lit"
    summary = "locked image tuning: the encoder is frozen, only the heads of the contrastive loss train"
    untouched = True
    cacheable = "pooled"

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
    ) -> None:
        super().__init__(optimizer, regularizer)
        if objective.reconstruction_weight or objective.contrastive_view != "full":
            raise WlsupError(
                "lit leaves the encoder as it is: set objective.reconstruction_weight to 0 and "
                "objective.contrastive_view to full."
            )
        objective.refuse("micro_batch", because="lit keeps no activations of the encoder")
        self.objective, self.lr, self.weight_decay = objective, lr, weight_decay
        self.mae, self.text, self.head = build_towers(encoder, decoder, text, objective)

    @property
    def encoder(self) -> VisionEncoder:
        """The locked vision encoder."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """The heads train, and nothing else."""
        return TrainPlan([Train("head.*", self.lr, self.weight_decay), Freeze("mae.*"), Freeze("text.*")])

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The pretrained vision and text encoders."""
        return {**super().bases, "text": self.text.base}

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Contrast."""
        image, text = self.embed(batch)
        loss = contrast(self.head, image, text, self.objective, batch.keys)
        return {"loss": self.objective.contrastive_weight * loss, "contrastive": loss}

    def embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """(B, E) pictures and (B, E) captions."""
        image = self.head.embed_images(self.encode(batch).pooled)
        return image, self.head.embed_captions(self.text.pooled(batch.captions))

    def on_fit_start(self) -> None:
        """With cached features, read every training caption once too: the text encoder is as frozen as the other."""
        data = self.trainer.datamodule
        if getattr(data, "cache_features", False):
            self.text.remember(chain.from_iterable(data.captions))
