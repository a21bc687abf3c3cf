"""The thin base of every approach: it follows the plan, logs what the approach computes, and saves what trained."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning
from torch import Tensor

from wlsup.batch import CaptionBatch, ImageSpec
from wlsup.errors import WlsupError
from wlsup.models.heads import ContrastiveHead
from wlsup.models.vision import VisionEncoder
from wlsup.objectives.contrastive import clamp_logit_scale_
from wlsup.optim import OptimizerSpec, build_optimizer, build_schedule
from wlsup.plan import TrainPlan

__all__ = ["Approach"]


class Approach(lightning.LightningModule):
    """One way of teaching a vision encoder with captions.

    A subclass builds its parts in ``__init__`` and says what trains in `plan`, what is minimised in `losses`, and, if
    it compares pictures with captions, how each is embedded in `embed`.

    Args:
        optimizer: which optimizer and schedule; learning rates and weight decays are the plan's.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, optimizer: OptimizerSpec) -> None:
        super().__init__()
        self.optimizer_spec = optimizer
        self.strict_loading = (
            False  # checkpoints hold trained tensors only; on_load_checkpoint checks that all are there
        )

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
        """Return (B, E) picture and (B, E) caption embeddings of unit length, None where there is no shared space."""
        return None

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D): the one door of every evaluation."""
        return self.encoder.features(images)

    def setup(self, stage: str) -> None:
        """Follow the plan before the optimizer is made."""
        self.plan.apply(self)

    def train(self, mode: bool = True) -> Approach:
        """Train mode for what trains only: frozen modules stay in eval mode through every epoch."""
        super().train(mode)
        if mode:
            self.plan.set_train_mode(self)
        return self

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch of pairs and log its parts."""
        losses = self.losses(batch)
        parts = {f"train/{name}": value.detach() for name, value in losses.items() if name != "loss"}
        self.log_dict(parts, batch_size=len(batch))
        self.log("train/loss", losses["loss"].detach(), prog_bar=True, batch_size=len(batch))
        return losses["loss"]

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> tuple[Tensor, Tensor] | None:
        """Log the losses of one batch of held-out pairs; return its embeddings, which retrieval collects."""
        losses = self.losses(batch)
        self.log_dict({f"val/{name}": value for name, value in losses.items()}, batch_size=len(batch), sync_dist=True)
        return self.embed(batch)

    def on_train_batch_end(self, *args: Any) -> None:
        """Keep every logit scale in its range."""
        for module in self.modules():
            if isinstance(module, ContrastiveHead):
                clamp_logit_scale_(module.logit_scale)

    def configure_optimizers(self) -> dict:
        """One optimizer over the plan's groups, its schedule stepped every batch."""
        optimizer = build_optimizer(self.optimizer_spec, self.plan.parameter_groups(self))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(self.optimizer_spec, optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def saved_names(self) -> set[str]:
        """Names of what a checkpoint holds: trained parameters, and the buffers of the modules that own one."""
        trained = set(self.plan.trained_names(self))
        owners = {name.rpartition(".")[0] for name in trained}
        buffers = {name for name, _ in self.named_buffers() if name.rpartition(".")[0] in owners}
        return (trained | buffers) & set(self.state_dict(keep_vars=True))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained tensors only, and say on what they stand."""
        keep = self.saved_names()
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in keep}
        checkpoint["wlsup"] = {"approach": self.name, "bases": self.bases, "plan": self.plan.describe(self)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another approach, of another base model, or with other tensors.

        Raises:
            WlsupError: naming the approach, the base model or the tensors that differ.
        """
        said = checkpoint.get("wlsup")
        if said is None:
            raise WlsupError("This checkpoint was not written by wlsup: it does not say its approach and base model.")
        if said["approach"] != self.name:
            raise WlsupError(f"This checkpoint is of approach {said['approach']!r}; the run is of {self.name!r}.")
        for role, base in self.bases.items():
            theirs = said["bases"].get(role, {"id": "none", "sha256": ""})
            if theirs["sha256"] != base["sha256"]:
                raise WlsupError(
                    f"This checkpoint stands on another {role}: {theirs['id']} ({theirs['sha256'][:12]}), not "
                    f"{base['id']} ({base['sha256'][:12]}). Resume with the same base weights."
                )
        shapes = {name: tuple(t.shape) for name, t in self.state_dict().items() if name in self.saved_names()}
        given = {name: tuple(t.shape) for name, t in checkpoint["state_dict"].items()}
        if differing := sorted(n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n)):
            raise WlsupError(
                f"This checkpoint does not fit the configuration: {len(differing)} tensors differ, first "
                f"{differing[0]} ({given.get(differing[0])} saved, {shapes.get(differing[0])} here). "
                "Use the run's own config.yaml."
            )
