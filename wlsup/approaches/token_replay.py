"""Token replay adapters in a frozen encoder, conditioned on language. Ours, not published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from wlsup.adapters.token_replay import TokenReplay
from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.models.mae import DecoderSpec
from wlsup.models.text import TextSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.contrastive import CLIP_LOGIT_SCALE, info_nce
from wlsup.objectives.regularizers import RegularizerSpec, without_adapters
from wlsup.objectives.two_branch import ObjectiveSpec, build_towers, pair_embeddings, two_branch_losses
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainIf, TrainPlan
from wlsup.reprogramming.conditioner import CaptionReprogrammer, ReprogrammerSpec

__all__ = ["TokenReplayApproach"]


class TokenReplayApproach(Approach):
    """A frozen MAE whose blocks look again at a few tokens computed once, from the caption and the picture.

    Source: the adapter is ours (`wlsup.adapters.token_replay`): the talk that this suite follows names token replay
    adapters, and nothing is published under the name. He et al. 2022 (MAE); Radford et al. 2021 (contrastive loss).

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
        kind: "layerwise" or "concat": whether a block's tokens ask the replayed ones, or both ask both.
        source: what is replayed: "caption", "image" (patch tokens from an earlier block) or "both".
        tokens: number of tokens replayed from each source; null: all it has.
        hidden: channels of the bottleneck.
        heads: attention heads, a divisor of ``hidden``.
        layers: indices of the adapted blocks; null: all that can be.
        image_block: index of the block whose patch tokens are stored.
        share_projection: one projection of the replayed tokens for all blocks.
        gate: "tanh" (a gate that starts shut) or "zero_up" (an up-projection that starts at zero).
        reprogrammer: replay tokens that a reprogrammer makes of captions, learned from nothing, in place of the text
            encoder's tokens (ours); null: the text encoder's.
        train_decoder: whether MAE's decoder trains, where it is used; by default only if it has no pretrained weights.

    Raises:
        WlsupError: a reprogrammer whose tokens would never be replayed.
    """

    name = "token_replay"
    summary = "token replay adapters (ours): a frozen encoder's blocks look again at caption and image tokens"

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
        kind: Literal["layerwise", "concat"] = "layerwise",
        source: Literal["caption", "image", "both"] = "both",
        tokens: int | None = 8,
        hidden: int = 32,
        heads: int = 4,
        layers: Sequence[int] | None = None,
        image_block: int = 0,
        share_projection: bool = False,
        gate: Literal["tanh", "zero_up"] = "tanh",
        reprogrammer: ReprogrammerSpec | None = None,
        train_decoder: bool | None = None,
    ) -> None:
        super().__init__(optimizer, regularizer)
        self.objective, self.lr, self.weight_decay, self.gate_lr = objective, lr, weight_decay, gate_lr
        if reprogrammer is not None and (source == "image" or not objective.reconstruction_weight):
            raise WlsupError(
                "a reprogrammer's tokens are replayed in the reconstruction branch alone, and not with source image: "
                "leave reprogrammer out, or set source to both and objective.reconstruction_weight above 0."
            )
        self.mae, self.text, self.head = build_towers(encoder, decoder, text, objective)
        self.reprogrammer = None if reprogrammer is None else CaptionReprogrammer(self.encoder, reprogrammer)
        self.adapter = TokenReplay(
            self.encoder.embed_dim,
            len(self.encoder.blocks),
            self.text.width if self.reprogrammer is None else self.reprogrammer.width,
            kind=kind,
            source=source,
            tokens=tokens,
            hidden=hidden,
            heads=heads,
            layers=layers,
            image_block=image_block,
            share_projection=share_projection,
            gate=gate,
        ).attach(self.encoder)
        wanted = not self.mae.decoder_pretrained if train_decoder is None else train_decoder
        self.train_decoder = wanted and bool(objective.reconstruction_weight)
        self._waiting: list[Parameter] = []

    @property
    def encoder(self) -> VisionEncoder:
        """The frozen vision encoder with its adapter."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """The adapter and the heads train, but for what no loss reaches; the encoder never does."""
        decoder = [Freeze("mae.decoder.pos_embed"), Train("mae.decoder.*", self.lr, self.weight_decay)]
        told = bool(self.objective.reconstruction_weight)
        return TrainPlan(
            [
                *([] if told else [Freeze("adapter.caption_reader.*", optional=True)]),
                Train("adapter.*.g", self.gate_lr, optional=True),
                Train("adapter.*", self.lr, self.weight_decay),
                Train("reprogrammer.*", self.lr, optional=True),
                TrainIf(self.objective.contrastive_weight, "head.*", self.lr, self.weight_decay),
                *(decoder if self.train_decoder else []),
                Freeze("mae.*"),
                Freeze("text.*"),
            ]
        )

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The pretrained vision and text encoders, and the tokenizer whose ids a reprogrammer embeds."""
        own = {} if self.reprogrammer is None else {"reprogrammer": self.reprogrammer.tokenizer.base}
        return {**super().bases, "text": self.text.base, **own}

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Reconstruction under the caption, contrast under the null condition; before them a reprogrammer's warm-up."""
        captions = self.text(batch.captions)
        if self.reprogrammer is None:
            return two_branch_losses(self.mae, self.head, batch.images, captions, self.objective, keys=batch.keys)
        self.reprogrammer.calibrate(self.encoder, batch.images)
        if self.training and self.reprogrammer.warming:
            image, text = self.reprogrammer.warm_up(without_adapters(self.encoder), batch.images, batch.captions)
            loss = info_nce(image, text, torch.tensor(CLIP_LOGIT_SCALE, device=image.device), keys=batch.keys)
            return self.reprogrammer.guard({"loss": loss, "warm_up": loss})
        captions = self.reprogrammer(batch.captions, captions)
        losses = two_branch_losses(self.mae, self.head, batch.images, captions, self.objective, keys=batch.keys)
        return self.reprogrammer.guard(losses) if self.training else losses

    def training_losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Return `losses` with the regulariser's terms added, which hold nothing yet while the reprogrammer warms up.

        Meanwhile the loss reaches all that trains, times 0: the other processes wait for every tensor's gradient.
        """
        if self.reprogrammer is None or not self.reprogrammer.warming:
            return super().training_losses(batch)
        trained = [one for one in self.plan.resolve(self) if one.rule.trains]
        self._waiting = [one.parameter for one in trained if not one.name.startswith("reprogrammer.")]
        losses = self.losses(batch)
        return {**losses, "loss": losses["loss"] + 0 * sum(parameter.sum() for parameter in self._waiting)}

    def on_after_backward(self) -> None:
        """Take away the gradients of what waits for the warm-up: 0 as they are, weights decay with them."""
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting = []

    def embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor] | None:
        """(B, E) pictures, under the null condition, and (B, E) captions; None where contrast has no weight."""
        return pair_embeddings(self.mae, self.head, self.text, batch, self.objective)
