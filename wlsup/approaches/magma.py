"""A frozen language model that is taught to read pictures: a picture prefix, and adapters in its blocks (MAGMA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wlsup.adapters.language import LanguageAdapters, LanguageAdapterSpec
from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch, VisionOutput
from wlsup.models.language import GenerationSpec, LanguageModel, LanguageSpec
from wlsup.models.prefix import ImagePrefix, PrefixSpec
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision
from wlsup.objectives.captioning import prefix_captioning_loss
from wlsup.objectives.held_out_captions import captioner_task
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainPlan

__all__ = ["Magma"]


class Magma(Approach):
    """A captioner whose loss trains the encoder, the picture's map and adapters inside a frozen language model.

    The encoder's patch tokens go through a linear map, dropout and LayerNorm in front of the caption. Bottlenecks in
    every block of the language model learn to read them; its own weights never move, which the plan sees to: the
    published code means to freeze them and does not. The encoder never sees a caption.

    Source: Eichenberg et al. 2022, "MAGMA - Multimodal Augmentation of Generative Models through Adapter-based
    Finetuning".

    Args:
        encoder: the pretrained vision encoder.
        language: the frozen causal language model.
        prefix: how pictures go in front of captions.
        adapters: where adapters go in the language model, and what they are.
        generation: how captions are put into words.
        optimizer: optimizer and schedule; MAGMA's is AdamW with betas (0.9, 0.95).
        regularizer: what holds the encoder near the pretrained one.
        lr: of map and adapters, after warm-up.
        weight_decay: of matrices.
        encoder_lr: of the pretrained encoder; 0 freezes it.

    Raises:
        WlsupError: prefix and captions do not fit the language model's positions, or adapters do not fit its blocks.
    """

    name = "magma"
    summary = "picture prefix and adapters in a frozen language model (MAGMA); the vision encoder tunes or stays frozen"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        language: LanguageSpec = LanguageSpec(),
        prefix: PrefixSpec = PrefixSpec(),
        adapters: LanguageAdapterSpec = LanguageAdapterSpec(),
        generation: GenerationSpec = GenerationSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(betas=(0.9, 0.95)),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 8e-4,
        weight_decay: float = 0.0,
        encoder_lr: float = 2e-6,
    ) -> None:
        super().__init__(optimizer, regularizer)
        self.lr, self.weight_decay, self.encoder_lr, self.generation = lr, weight_decay, encoder_lr, generation
        self.untouched = not encoder_lr
        self.cacheable = "tokens" if self.untouched else ""
        self.vision = build_vision(encoder)
        self.language = LanguageModel(language)
        self.prefix = ImagePrefix(self.encoder.embed_dim, self.language.width, prefix)
        self.language.check_length(self.prefix.positions(self.encoder.grid_size), generation)
        blocks = self.language.blocks
        self.adapters = LanguageAdapters(blocks, self.language.hidden_size, adapters).attach(blocks)

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder."""
        return self.vision

    @property
    def plan(self) -> TrainPlan:
        """Map and adapters train, and the encoder unless it is frozen; the language model never does."""
        encoder = [Freeze("vision.*pos_embed", optional=True), Train("vision.*", self.encoder_lr, self.weight_decay)]
        return TrainPlan(
            [
                Train("adapters.*", self.lr, self.weight_decay),
                Train("prefix.*", self.lr, self.weight_decay),
                *([Freeze("vision.*")] if self.untouched else encoder),
                Freeze("language.*"),
            ]
        )

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The vision encoder and the language model."""
        return {**super().bases, "language": self.language.base}

    @property
    def shardable(self) -> list[nn.Module]:
        """The language model's blocks."""
        return list(self.language.blocks)

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Captioning behind the mapped picture."""
        captions = self.language.tokenizer(batch.captions, device=batch.images.device)
        loss = prefix_captioning_loss(self.language, self._front(self.encode(batch)), captions)
        return {"loss": loss, "captioning": loss}

    def kept(self, images: Tensor) -> VisionOutput:
        """(B, 3, H, W) of the encoder's size -> what a cache keeps of them: no more tokens than the map reads."""
        return self.prefix.reduced(self.encoder(images), self.encoder.grid_size)

    @torch.no_grad()
    def caption(self, images: Tensor, generation: GenerationSpec | None = None) -> list[str]:
        """(B, 3, H, W) -> B captions; put the model in eval mode yourself."""
        side = self.encoder.patch_size
        front = self.prefix(self.encoder(images), (images.shape[-2] // side, images.shape[-1] // side))
        return self.language.generate(front, generation or self.generation)

    def measure(self, datamodule: Any) -> dict[str, Any]:
        """Measure the loss of held-out captions: with their pictures, with others', and without the adapters.

        Args:
            datamodule: of the run; its held-out pairs are what is measured on.

        Returns:
            See `Approach.measure`; with "captions", a few generated ones. Nothing where no pairs are held out.
        """
        held_out = [batch.to(self.device) for batch in datamodule.val_dataloader()]
        aside = self.adapters.aside
        return captioner_task(self.name, self.language, self.encode, self._front, held_out, self.generation, aside)

    def _front(self, seen: VisionOutput) -> Tensor:
        return self.prefix(seen, self.encoder.grid_size)
