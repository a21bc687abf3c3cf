"""The thin base of every approach: it follows the plan, logs what the approach computes, and saves what trained."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import lightning
from torch import Tensor

from wlsup.approaches.checkpoint import StartingPoint, check_checkpoint, pack_checkpoint
from wlsup.batch import CaptionBatch, ImageSpec, VisionOutput
from wlsup.models.vision import VisionEncoder
from wlsup.objectives.contrastive import clamp_logit_scales_
from wlsup.objectives.regularizers import Regularizer, RegularizerSpec, without_adapters
from wlsup.optim import OptimizerSpec, build_optimizer, build_schedule
from wlsup.plan import TrainPlan
from wlsup.ranks import alone

__all__ = ["Approach"]


class Approach(lightning.LightningModule):
    """One way of teaching a vision encoder with captions.

    A subclass builds its parts and says what trains in `plan`, is minimised in `losses`, and is compared in `embed`.

    Args:
        optimizer: which optimizer and schedule; learning rates and weight decays are the plan's.
        regularizer: what holds the encoder near the pretrained one, and how hard.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    untouched: bool = False
    """The plan leaves the encoder's function as it is (its configuration may decide): features may be cached."""
    cacheable: Literal["", "pooled", "tokens"] = ""
    """What `losses` and `embed` take of pictures, by `encode` only; "" where they need the pictures themselves."""
    identity_at_start: ClassVar[bool] = True
    """At step 0 the encoder computes the pretrained function."""

    def __init__(self, optimizer: OptimizerSpec, regularizer: RegularizerSpec = RegularizerSpec()) -> None:
        super().__init__()
        self.optimizer_spec, self.regularizer = optimizer, Regularizer(regularizer)
        self.start, self.strict_loading = StartingPoint(), False  # checkpoints hold what trains, and are checked

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder under study, adapters attached."""
        raise TypeError(f"{type(self).__name__} does not say which encoder it teaches: define encoder.")

    @property
    def plan(self) -> TrainPlan:
        """What trains, at which rate; everything else is frozen."""
        raise TypeError(f"{type(self).__name__} does not say what trains: define plan.")

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The pretrained models underneath: role -> id and sha256; a checkpoint loads only onto the same ones."""
        return {"encoder": {"id": self.encoder.base_id, "sha256": self.encoder.base_sha256}}

    @property
    def image_spec(self) -> ImageSpec:
        """How the encoder wants its pictures; the data module asks."""
        return self.encoder.image_spec

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Return scalars by name; "loss" is minimised, the others are logged."""
        raise TypeError(f"{type(self).__name__} does not say what it minimises: define losses().")

    def embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor] | None:
        """Return (B, E) picture and (B, E) caption embeddings of unit length, None where no shared space is learned."""
        return None

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D): the one door of every evaluation."""
        return self.encoder.features(images)

    def encode(self, batch: CaptionBatch) -> VisionOutput:
        """Return what the encoder makes of whole pictures, told no caption; or what a cache kept (`what_is_kept`)."""
        return self.encoder(batch.images) if batch.encoded is None else batch.encoded

    def pretrained(self) -> VisionEncoder:
        """Return the encoder as it was before training, a teacher for the regulariser; called before step 1."""
        return without_adapters(self.encoder)

    def measure(self, datamodule: Any) -> dict[str, Any]:
        """Return what is to be measured of this approach beside k-NN, when it is trained; in eval mode, on rank 0.

        Returns:
            Nothing, or {"title": str, "rows": [{"what": str, "value": float, "unit": "%" | "nats" | "", "chance": float
            or None, "n": of how many a share is, or "ci95"}], "note": str}: "task" of results.json and the terminal.
        """
        return {}

    def setup(self, stage: str) -> None:
        """Follow the plan before the optimizer is made; remember where training starts."""
        self.plan.apply(self)
        self.train()  # Lightning takes modules in the modes that it finds
        parameters = {planned.name: planned.parameter for planned in self.plan.resolve(self) if planned.rule.trains}
        self.regularizer.begin(self.features, self.pretrained, parameters, self.image_spec.size)
        self.start.note(self)

    def train(self, mode: bool = True) -> Approach:
        """Train mode for what trains only: frozen modules stay in eval mode through every epoch."""
        super().train(mode)
        if mode:
            self.plan.set_train_mode(self)
        return self

    def training_losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Return `losses` with the regulariser's terms added, in the micro-batches of the objective if it has any."""
        micro_batch = getattr(getattr(self, "objective", None), "micro_batch", None)
        return self.regularizer.add(self.losses(batch), self.features, batch, micro_batch)

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch of pairs and log its parts."""
        losses = self.training_losses(batch)
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items() if k != "loss"}, batch_size=len(batch))
        self.log("train/loss", losses["loss"].detach(), prog_bar=True, batch_size=len(batch))
        return losses["loss"]

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> tuple[Tensor, Tensor] | None:
        """Log the losses of one batch of held-out pairs; return its embeddings, which retrieval collects."""
        with alone():  # each process has all held-out pairs: gathered, they would count several times
            losses = self.losses(batch)
        self.log_dict({f"val/{name}": value for name, value in losses.items()}, batch_size=len(batch), sync_dist=True)
        return self.embed(batch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, and at once, before anything saves the weights, `after_step`."""
        super().optimizer_step(*args, **kwargs)
        self.after_step()

    def after_step(self) -> None:
        """Keep every logit scale in its range."""
        clamp_logit_scales_(self)

    def configure_optimizers(self) -> dict:
        """One optimizer over the plan's groups, its schedule stepped every batch."""
        made = build_optimizer(self.optimizer_spec, self.plan.parameter_groups(self))
        schedule = build_schedule(self.optimizer_spec, made, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained tensors only, and say on what they stand."""
        pack_checkpoint(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another approach, of another base model, or with other tensors."""
        check_checkpoint(self, checkpoint)
