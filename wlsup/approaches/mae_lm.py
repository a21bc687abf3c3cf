"""Masked reconstruction and captioning, the latter through a frozen language model or all at once (CapPa)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch, VisionOutput
from wlsup.errors import WlsupError
from wlsup.models.caption_decoder import CaptionDecoder, CaptionDecoderSpec
from wlsup.models.caption_tokens import CaptionTokenizer, load_tokenizer
from wlsup.models.language import GenerationSpec, LanguageModel, LanguageSpec
from wlsup.models.mae import DecoderSpec, MAEOutput, build_mae, random_masking
from wlsup.models.prefix import ImagePrefix, PrefixSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.captioning import CaptioningSpec, parallel_captioning_loss, prefix_captioning_loss
from wlsup.objectives.reconstruction import reconstruction_loss
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainIf, TrainPlan

__all__ = ["MaeLM"]


class MaeLM(Approach):
    """An encoder that reconstructs what is hidden and is read by a captioner, both losses training it (the talk's "1").

    With ``captioning: prefix`` the encoder's tokens go, linearly mapped, in front of the caption into a frozen language
    model, whose loss reaches the encoder through the map. With ``captioning: parallel`` a small decoder of its own
    reads the encoder's tokens by cross-attention, most captions predicted all at once. The encoder never sees a
    caption.

    Source: He et al. 2022 (MAE); Eichenberg et al. 2022 (MAGMA) for the prefix; Tschannen et al. 2023 (CapPa) for
    parallel prediction.

    Args:
        encoder: the pretrained vision encoder.
        decoder: MAE's decoder, where the encoder's weights bring none.
        language: the frozen causal language model; with parallel captioning, whose tokenizer is used, and no more.
        prefix: how pictures go in front of captions; with prefix captioning.
        caption_decoder: the captioner's shape; with parallel captioning.
        objective: which captioning, weights, mask ratio, what the captioner sees.
        generation: how captions are put into words; with prefix captioning.
        optimizer: optimizer and schedule.
        regularizer: what holds the encoder near the pretrained one.
        lr: of the map or the caption decoder, after warm-up.
        weight_decay: of matrices.
        encoder_lr: of the pretrained encoder, and decoder unless that is fresh, lower than that of the fresh parts.

    Raises:
        WlsupError: prefix and captions do not fit the language model's positions, or squares of a masked picture's
            patches are to be averaged.
    """

    name = "mae_lm"
    summary = "MAE plus captioning through a frozen language model (or CapPa); the whole encoder trains"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        decoder: DecoderSpec = DecoderSpec(),
        language: LanguageSpec = LanguageSpec(),
        prefix: PrefixSpec = PrefixSpec(),
        caption_decoder: CaptionDecoderSpec = CaptionDecoderSpec(),
        objective: CaptioningSpec = CaptioningSpec(),
        generation: GenerationSpec = GenerationSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        encoder_lr: float = 1e-4,
    ) -> None:
        super().__init__(optimizer, regularizer)
        self.objective, self.generation = objective, generation
        self.lr, self.weight_decay, self.encoder_lr = lr, weight_decay, encoder_lr
        self.mae = build_mae(encoder, decoder)
        self.language: LanguageModel | None = None
        if objective.captioning == "prefix":
            if prefix.pool > 1 and objective.caption_view == "masked" and objective.captioning_weight:
                raise WlsupError(
                    f"prefix.pool {prefix.pool} averages squares of patches, and with objective.caption_view masked "
                    "pictures have holes: set prefix.pool to 1."
                )
            self.language = LanguageModel(language)
            self.tokenizer: CaptionTokenizer = self.language.tokenizer
            self.prefix = ImagePrefix(self.encoder.embed_dim, self.language.width, prefix)
            # Also where training sees less: k-NN's and `caption`'s pictures are whole.
            self.language.check_length(self.prefix.positions(self.encoder.grid_size), generation)
        else:
            self.tokenizer = load_tokenizer(language.weights, language.max_length)
            self.captioner = CaptionDecoder(
                self.encoder.embed_dim, len(self.tokenizer), language.max_length, caption_decoder
            )

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """Encoder, decoder and what reads the encoder train; the language model is frozen."""
        reader = "captioner.*" if self.language is None else "prefix.*"
        return TrainPlan(
            [
                TrainIf(self.objective.captioning_weight, reader, self.lr, self.weight_decay),
                Freeze("mae.*pos_embed"),
                Train("mae.encoder.*", self.encoder_lr, self.weight_decay),
                TrainIf(
                    self.objective.reconstruction_weight,
                    "mae.decoder.*",
                    self.mae.decoder_lr(self.encoder_lr, self.lr),
                    self.weight_decay,
                ),
                *([] if self.language is None else [Freeze("language.*")]),
            ]
        )

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The vision encoder, and the language model or, where only that is used, its tokenizer."""
        if self.language is None:
            return {**super().bases, "tokenizer": self.tokenizer.base}
        return {**super().bases, "language": self.language.base}

    @property
    def shardable(self) -> list[nn.Module]:
        """The blocks of the language model, where there is one."""
        return [] if self.language is None else list(self.language.blocks)

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Masked reconstruction, and the captions told from the whole picture or from the visible patches."""
        spec, output = self.objective, None
        losses: dict[str, Tensor] = {}
        total = batch.images.new_zeros((), dtype=torch.float32)
        if spec.reconstruction_weight:
            warming = self.mae.warming_up()
            output = self.mae(batch.images, mask_ratio=spec.mask_ratio, predict_kept=False, warming=warming)
            losses["reconstruction"] = reconstruction_loss(
                output.prediction, batch.images, output.mask, self.mae.patch_size, self.mae.normalize_pixels
            )
            total = total + spec.reconstruction_weight * losses["reconstruction"]
        if spec.captioning_weight:
            losses["captioning"] = self._captioning(*self._view(batch.images, output), batch)
            total = total + spec.captioning_weight * losses["captioning"]
        losses["loss"] = total
        return losses

    @torch.no_grad()
    def caption(self, images: Tensor, generation: GenerationSpec | None = None) -> list[str]:
        """(B, 3, H, W) -> B captions, from whole pictures; put the model in eval mode yourself.

        A captioner that was only trained to predict all at once does so; else it goes word after word, and a decoder of
        its own takes the likeliest.
        """
        seen = self.encoder(images)
        if self.language is not None:
            return self.language.generate(self.prefix(seen, self._grid(images)), generation or self.generation)
        at_once = self.objective.parallel_fraction == 1
        return self.tokenizer.decode(self.captioner.generate(seen.tokens, self.tokenizer.end_id, parallel=at_once))

    def _view(self, images: Tensor, output: MAEOutput | None) -> tuple[VisionOutput, Tensor | None]:
        """Return what the captioner sees, and which patches that is where it is not all."""
        if self.objective.caption_view == "full":
            return self.encoder(images), None
        if output is not None:
            return output.latent, output.ids_keep
        rows, columns = self._grid(images)
        keep, _, _ = random_masking(len(images), rows * columns, self.objective.mask_ratio, device=images.device)
        return self.encoder(images, ids_keep=keep), keep

    def _captioning(self, seen: VisionOutput, ids_keep: Tensor | None, batch: CaptionBatch) -> Tensor:
        device = batch.images.device
        if self.language is not None:
            captions = self.tokenizer(batch.captions, device=device)
            prefix = self.prefix(seen, self._grid(batch.images), ids_keep)
            return prefix_captioning_loss(self.language, prefix, captions)
        # Of one length, whatever the batch: predicted all at once, a caption must not learn it from its neighbours'.
        captions = self.tokenizer(batch.captions, length=self.tokenizer.max_length, device=device)
        return parallel_captioning_loss(
            self.captioner, seen.tokens, captions, self.tokenizer.end_id, self.objective.parallel_fraction
        )

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.mae.patch_size, images.shape[-1] // self.mae.patch_size
