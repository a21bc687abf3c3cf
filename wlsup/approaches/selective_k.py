"""Selective k-fine-tuning: only the k groups of the encoder's weights that matter most train."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor
from torch.nn import Parameter

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch
from wlsup.draws import shared
from wlsup.errors import WlsupError, choose
from wlsup.models.mae import DecoderSpec
from wlsup.models.text import TextSpec
from wlsup.models.vision import VisionEncoder, VisionSpec
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec, build_towers, contrast, pair_embeddings, two_branch_losses
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainIf, TrainPlan
from wlsup.selection.criteria import (
    CRITERIA,
    GRADIENT_CRITERIA,
    alpha_scores,
    choose_groups,
    gradient_scores,
    place_scores,
)
from wlsup.selection.groups import Granularity, parameter_groups

__all__ = ["SelectiveK"]

_log = logging.getLogger("wlsup")

_ENCODER = "mae.encoder.backbone."


class SelectiveK(Approach):
    """Of the encoder's ordered groups of weights, the k with the highest score train; the others stay frozen.

    "Selective k-fine-tuning" is a name from the talk without a published definition; this one is ours. ``k = 0`` leaves
    the encoder frozen, and features may be cached where its loss and criterion read no more than those; ``k`` = all is
    `full`. Scores by gradients are computed once, from the first batches of training under this approach's own loss,
    of gradients averaged over the processes, so that each chooses the same; what was chosen is in the plan and in the
    checkpoint. The objective is `full`'s: contrastive, and masked reconstruction where it has a weight.

    Source: ours; nearest to it, Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts".

    Args:
        encoder: the pretrained vision encoder.
        decoder: MAE's decoder, where the encoder's weights bring none; trains, as in `full`, if reconstruction has a
            weight.
        text: the frozen text encoder.
        objective: losses, their weights, mask ratio.
        optimizer: optimizer and schedule.
        regularizer: what holds the encoder near the pretrained one.
        lr: of the heads, after warm-up.
        weight_decay: of matrices.
        encoder_lr: of the chosen groups (and the decoder, unless that is fresh).
        k: how many groups train; None: as many as ``groups`` names.
        criterion: "last" or "first" in order; "random"; "rgn", relative gradient norm; "fisher", mean squared gradient;
            "alpha", the exponent of the weights' spectra, largest first; "explicit", those named in ``groups``.
        granularity: "block" (patch embedding, each block, final norm and pooling), "sublayer" or "tensor".
        groups: names of groups, for "explicit".
        batches: how many of the first batches gradients are scored on.
        selection_seed: of the random choice, and of masks while scoring.

    Raises:
        WlsupError: an unknown criterion or group, k out of range, or a share of captions to drop.
    """

    name = "selective_k"
    summary = "fine-tuning of only the k groups of the encoder that a criterion picks (our definition)"
    trains_told = ("head.*", "the k groups of mae.encoder.* that the criterion chooses")

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
        k: int | None = 3,
        criterion: Literal["last", "first", "random", "rgn", "fisher", "alpha", "explicit"] = "last",
        granularity: Granularity = "block",
        groups: Sequence[str] = (),
        batches: int = 5,
        selection_seed: int = 0,
    ) -> None:
        super().__init__(optimizer, regularizer)
        objective.refuse("caption_dropout", because="the encoder is told no caption, so there is none to drop")
        self.objective, self.lr, self.weight_decay, self.encoder_lr = objective, lr, weight_decay, encoder_lr
        self.criterion = choose("criterion", criterion, CRITERIA)
        if batches < 1:
            raise WlsupError(f"batches must be at least 1, not {batches}.")
        self.batches, self.selection_seed = batches, selection_seed
        self.mae, self.text, self.head = build_towers(encoder, decoder, text, objective)
        self.groups = parameter_groups(self.encoder.backbone, granularity)
        self.k = self._checked_k(k, groups)
        self.untouched = not self.k
        features_alone = not objective.reconstruction_weight and objective.contrastive_view == "full"
        if self.untouched and features_alone and criterion not in GRADIENT_CRITERIA:
            self.cacheable = "pooled"
        self.scores: dict[str, float] = {}
        self.chosen: tuple[str, ...] | None = None
        if criterion == "explicit":
            self.chosen = tuple(group.name for group in self.groups if group.name in groups)
        elif criterion not in GRADIENT_CRITERIA:
            self.select(())

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder."""
        return self.mae.encoder

    @property
    def plan(self) -> TrainPlan:
        """The chosen groups and the heads train.

        Raises:
            WlsupError: the groups are chosen by gradients, and no batch has been seen yet.
        """
        if self.chosen is None:
            raise WlsupError(
                f"criterion {self.criterion!r} chooses the groups from the first batches of training: before that "
                "there is no plan. Call select(batches), as `wlsup fit` and `wlsup inspect` do."
            )
        chosen = [group for group in self.groups if group.name in self.chosen]
        patterns = [_ENCODER + pattern for group in chosen for pattern in group.patterns]
        used = bool(self.objective.reconstruction_weight)
        decoder = (
            [Train("mae.decoder.*", self.mae.decoder_lr(self.encoder_lr, self.lr), self.weight_decay)] if used else []
        )
        every = len(chosen) == len(self.groups)
        return TrainPlan(
            [
                TrainIf(self.objective.contrastive_weight, "head.*", self.lr, self.weight_decay),
                Freeze("mae.*pos_embed"),
                *(Train(pattern, self.encoder_lr, self.weight_decay) for pattern in patterns),
                *decoder,
                Freeze("mae.*", optional=every and used),
                Freeze("text.*"),
            ]
        )

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The pretrained vision and text encoders."""
        return {**super().bases, "text": self.text.base}

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Contrast, and masked reconstruction where it has a weight."""
        if batch.encoded is not None:
            return self._contrast_alone(batch)
        captions = self.text(batch.captions)
        return two_branch_losses(self.mae, self.head, batch.images, captions, self.objective, keys=batch.keys)

    def embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor] | None:
        """(B, E) pictures and (B, E) captions; None where contrast has no weight."""
        if batch.encoded is None:
            return pair_embeddings(self.mae, self.head, self.text, batch, self.objective)
        image = self.head.embed_images(batch.encoded.pooled)
        return image, self.head.embed_captions(self.text.pooled(batch.captions))

    def select(self, batches: Iterable[CaptionBatch]) -> tuple[str, ...]:
        """Score the groups, choose k of them and return their names, in the encoder's order.

        Args:
            batches: what gradients are scored on; other criteria look at none.
        """
        parameters = dict(self.encoder.backbone.named_parameters())
        if self.criterion in GRADIENT_CRITERIA:
            losses = self._losses_to_score(batches, list(parameters.values()))
            self.scores = gradient_scores(self.groups, parameters, losses, self.criterion)
        elif self.criterion == "alpha":
            self.scores = alpha_scores(self.groups, parameters)
        else:
            self.scores = place_scores(self.groups, self.criterion, self.selection_seed)
        self.chosen = tuple(group.name for group in choose_groups(self.groups, self.scores, self.k))
        return self.chosen

    def select_from(self, datamodule: Any) -> tuple[str, ...]:
        """As `select`, on the first batches of a data module; on none where the choice is made already."""
        if self.chosen is None:
            self.select(islice(datamodule.train_dataloader(), self.batches))
        return self.chosen

    def setup(self, stage: str) -> None:
        """Choose the groups where the choice needs batches, then follow the plan."""
        if self.chosen is None:
            if self._trainer is None:
                raise WlsupError(f"criterion {self.criterion!r} needs batches: call select(batches) before setup().")
            self.to(self._trainer.strategy.root_device)
            self.select_from(self._trainer.datamodule)
            _log.info("selective_k: %s chose %s", self.criterion, ", ".join(self.chosen) or "no group")
        super().setup(stage)

    def on_fit_start(self) -> None:
        """With cached features, read every training caption once too: the text encoder is as frozen as the other."""
        data = self.trainer.datamodule
        if getattr(data, "cache_features", False):
            self.text.remember(chain.from_iterable(data.captions))

    def measure(self, datamodule: Any) -> dict[str, Any]:
        """Return the scores by which the groups were chosen."""
        rows = [
            {"what": f"{name}{' (trained)' if name in self.chosen else ''}", "value": value, "unit": "", "chance": None}
            for name, value in self.scores.items()
        ]
        if len(rows) > 40 or not rows:  # tensors: the plan names them
            return {}
        return {"title": f"selective_k: score by {self.criterion}, k = {self.k}", "rows": rows, "note": ""}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was chosen, and by which scores."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["wlsup"]["selection"] = {"chosen": list(self.chosen), "scores": self.scores}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the choice over, whatever the first batches say now."""
        selection = checkpoint.get("wlsup", {}).get("selection")
        if selection is not None and self.criterion != "explicit":
            known = {group.name for group in self.groups}
            if not known.issuperset(selection["chosen"]) or len(selection["chosen"]) != self.k:
                raise WlsupError(
                    f"This checkpoint trained the groups {', '.join(selection['chosen'])}; the run has k = {self.k} of "
                    f"{', '.join(group.name for group in self.groups)}. Use the run's own config.yaml."
                )
            another = set(selection["chosen"]) != set(self.chosen or ())
            self.chosen, self.scores = tuple(selection["chosen"]), dict(selection["scores"])
            self.plan.apply(self)
            self.train(self.training)
            if another and self.regularizer.forget():  # the checkpoint's weights are not there yet
                trained = {one.name: one.parameter for one in self.plan.resolve(self) if one.rule.trains}
                self.regularizer.begin(self.features, self.pretrained, trained, self.image_spec.size)
        super().on_load_checkpoint(checkpoint)

    def _checked_k(self, k: int | None, named: Sequence[str]) -> int:
        if self.criterion != "explicit":
            if named or k is None or not 0 <= k <= len(self.groups):
                raise WlsupError(
                    f"criterion {self.criterion!r} takes k, between 0 and {len(self.groups)}, and no groups; given "
                    f"were k = {k} and {list(named)}. To name groups set criterion to explicit."
                )
            return k
        names = [group.name for group in self.groups]
        for name in named:
            choose("group", name, names)
        return len(set(named))

    def _contrast_alone(self, batch: CaptionBatch) -> dict[str, Tensor]:
        loss = contrast(self.head, *self.embed(batch), self.objective, batch.keys)
        return {"contrastive": loss, "loss": self.objective.contrastive_weight * loss}

    def _losses_to_score(self, batches: Iterable[CaptionBatch], parameters: list[Parameter]) -> Iterator[Tensor]:
        """Yield the loss of each batch, every parameter of the encoder trainable meanwhile.

        A fresh decoder's reconstruction says nothing of the encoder yet, and is left out where there is another loss.
        """
        alone = self.objective.contrastive_weight and not self.mae.decoder_pretrained
        losses = self._contrast_alone if alone else self.losses
        before = [parameter.requires_grad for parameter in parameters]
        self.eval()
        self.head.train()  # as in training, where it says whether the view is masked
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for position, batch in enumerate(batches):
                with torch.random.fork_rng(devices=cuda), shared(self.selection_seed + position):
                    torch.manual_seed(self.selection_seed + position)
                    yield losses(batch.to(self.device))["loss"]
        finally:
            self.head.eval()
            for parameter, required in zip(parameters, before, strict=True):
                parameter.requires_grad_(required)
