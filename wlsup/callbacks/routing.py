"""How tokens find experts, layer by layer, in TensorBoard."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

__all__ = ["RoutedLayer", "RoutingMonitor", "routed_layers", "routing_layout"]


class LayerRouting(Protocol):
    """What one forward pass of a layer did."""

    load: Tensor

    def scalars(self) -> dict[str, float]:
        """Return its figures by name."""
        ...


@runtime_checkable
class RoutedLayer(Protocol):
    """A layer that sends tokens to experts: `wlsup.moe.MoE`."""

    routing: LayerRouting | None

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return what keeps it in order."""
        ...


_CHARTS = {
    "load entropy (1: even, 0: one expert has all)": "load_entropy",
    "largest load": "load_max",
    "smallest load": "load_min",
    "router entropy, nats": "entropy",
    "dropped": "dropped",
    "largest logit": "max_logit",
    "dead experts": "dead",
}


def routed_layers(module: nn.Module) -> dict[str, RoutedLayer]:
    """Return a model's mixture-of-experts layers by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, RoutedLayer)}


def routing_layout(module: nn.Module) -> dict[str, list]:
    """Return TensorBoard's charts of routing, each with a line a layer, and of each layer the experts' loads.

    Nothing where a model has no such layers. Tags are regular expressions there.
    """
    layers = routed_layers(module)
    if not layers:
        return {}
    charts = {title: ["Multiline", [f"routing/{figure}/.+"]] for title, figure in _CHARTS.items()}
    return charts | {f"load, {name}": ["Multiline", [f"routing/load/{name}/.+"]] for name in layers}


class RoutingMonitor(Callback):
    """Log each mixture-of-experts layer's last training pass, whenever the other figures are logged.

    Tags are ``routing/<figure>/<layer>``, and ``routing/load/<layer>/<expert>`` in TensorBoard only. Where a model has
    no such layers nothing happens.
    """

    def __init__(self) -> None:
        self._seen = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if a step was taken."""
        before, self._seen = self._seen, trainer.global_step
        if not trainer.loggers or not trainer.is_global_zero or before == trainer.global_step:
            return
        if trainer.global_step % trainer.log_every_n_steps:
            return
        metrics = {}
        for name, layer in routed_layers(pl_module).items():
            if layer.routing is None:
                continue
            metrics |= {f"routing/{figure}/{name}": value for figure, value in layer.routing.scalars().items()}
            for board in trainer.loggers:
                if isinstance(board, TensorBoardLogger):
                    for expert, share in enumerate(layer.routing.load.tolist()):
                        board.experiment.add_scalar(f"routing/load/{name}/{expert}", share, trainer.global_step)
        for sink in trainer.loggers if metrics else []:
            sink.log_metrics(metrics, step=trainer.global_step)
