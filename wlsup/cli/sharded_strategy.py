"""``--trainer.strategy fsdp``: Lightning's DDP with an approach's large parts shared out (wlsup/sharding.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from wlsup.errors import WlsupError
from wlsup.sharding import SlicedGradScaler, clip_gradients_, cut, gathered, has_shards, leave_alone, shard

__all__ = ["ShardedStrategy", "units_of"]


class ShardedStrategy(DDPStrategy):
    """Lightning's DDP, with an approach's large parts shared out; ``--trainer.strategy fsdp``.

    A checkpoint holds whole tensors: it resumes on another number of processes, or without sharding.
    """

    def model_to_device(self) -> None:
        """Share out before anything is moved, unit by unit: the whole need never be on one GPU.

        Raises:
            WlsupError: the approach has nothing to share out, or one of its options does not go together with it.
        """
        module = self.lightning_module
        units = units_of(module)
        if not has_shards(module):
            trains = any(parameter.requires_grad for unit in units for parameter in unit.parameters())
            _refuse_what_needs_whole_tensors(module, trains)
            shard(units, self.root_device)
            if trains:
                self.precision_plugin.clip_gradients = _clip
                if getattr(self.precision_plugin, "scaler", None) is not None:
                    self.precision_plugin.scaler = SlicedGradScaler(self.root_device.type)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Leave what is shared out to `fully_shard`, which averages its gradients itself."""
        leave_alone(self.model)
        super().configure_ddp()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write whole tensors; all processes take part, the first one writes."""
        first = self.is_global_zero
        whole = tree_map_only(DTensor, lambda part: gathered(part, keep=first), checkpoint)
        super().save_checkpoint(whole, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Cut a checkpoint's whole moments as their parameters are cut."""
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {number: cut(entry, parameters[number]) for number, entry in saved["state"].items()}
            # How it computes is this run's: one that was saved under ddp has lists of tensors in mind.
            groups = [
                {**group, "foreach": own.get("foreach")}
                for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
            ]
            states.append({"state": state, "param_groups": groups})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


def units_of(module: nn.Module) -> list[nn.Module]:
    """Return what an approach shares out.

    Raises:
        WlsupError: nothing.
    """
    units = list(getattr(module, "shardable", ()))
    if not units:
        raise WlsupError(
            f"trainer.strategy fsdp shares out a language model and mixtures of experts, and approach "
            f"{getattr(module, 'name', type(module).__name__)!r} has neither: use ddp."
        )
    return units


def _refuse_what_needs_whole_tensors(module: nn.Module, trains: bool) -> None:
    regularizer, optimizer, callbacks = module.regularizer.spec, module.optimizer_spec.name, module.trainer.callbacks
    asked = {
        "regularizer.l2sp": trains and bool(regularizer.l2sp),
        "regularizer.ema": trains and bool(regularizer.ema),
        f"optimizer.name {optimizer}": trains and optimizer not in ("adamw", "sgd"),
        "wise_ft or spectra of the run's own end": trains
        and any(getattr(callback, "reads_whole_weights", False) for callback in callbacks),
        "spectra.layers": any(
            getattr(callback, "reads_whole_weights", False) and getattr(callback, "layers", None) is not None
            for callback in callbacks
        ),
    }
    if refused := [name for name, there in asked.items() if there]:
        shared = "mixtures of experts" if trains else "language models"
        raise WlsupError(
            f"Under trainer.strategy fsdp {shared} are shared out, and {' and '.join(refused)} cannot work on slices. "
            "Use adamw or sgd, neither l2sp nor ema, and `wlsup wise-ft` and `wlsup spectra` after the run; or "
            "trainer.strategy ddp."
        )


def _clip(optimizer: torch.optim.Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm") -> None:
    """Stand in for the precision plugin's, which takes norms of slices for the whole's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if clip_val > 0:
        clip_gradients_(parameters, clip_val, "value" if gradient_clip_algorithm == "value" else "norm")
