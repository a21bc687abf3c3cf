"""TensorBoard's custom scalars: in and out of domain, losses, routing and the rest, each in a group of its own.

A layout is written once, when a run starts, and TensorBoard joins the layouts of all runs by the titles of their groups
and charts; so a chart is there only where the run will log what it shows. Tags are regular expressions that TensorBoard
matches from the start of a tag: each ends in ``$``, or "R@1" would draw "R@10" as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.tensorboard.summary import hparams

from wlsup.batch import EvalSet
from wlsup.callbacks.captions import Captions
from wlsup.callbacks.guards import Guards
from wlsup.callbacks.knn import KNN
from wlsup.callbacks.retrieval import Retrieval
from wlsup.callbacks.routing import routing_layout

__all__ = ["Layout", "dashboard_layout", "log_hyperparameters"]

Layout = dict[str, dict[str, list]]  # group -> chart -> ["Multiline" or "Margin", tags]

_DOMAINS = {"in": "in domain", "out": "out of domain"}


def dashboard_layout(callbacks: Iterable[Callback], module: nn.Module) -> Layout:
    """Return groups and charts for what a run's callbacks will log.

    TensorBoard cannot draw a tag with brackets in it ("lr-AdamW/head.* (no decay)"), whose learning rate is that of the
    same tag without them: those are left out.

    A callback may be off (its ``enabled`` is False); then it has no charts.

    Args:
        callbacks: of the trainer.
        module: the approach.
    """
    found = {type(callback).__name__: callback for callback in callbacks if getattr(callback, "enabled", True)}
    knn = found.get(KNN.__name__)
    sets: Sequence[EvalSet] = knn.sets if knn else []
    layout: Layout = {}
    for domain, title in _DOMAINS.items():
        names = [eval_set.name for eval_set in sets if eval_set.domain == domain]
        if names:
            layout[title] = _domain(domain, names, wise_ft="WiseFT" in found)
    layout["losses"] = _losses(module)
    if Retrieval.__name__ in found and _has_shared_space(module):
        layout["held-out retrieval"] = {
            title: _lines(*(f"retrieval/{tag}_R@{k}" for k in (1, 5, 10)))
            for title, tag in (("picture to text", "image_to_text"), ("text to picture", "text_to_image"))
        }
    if Captions.__name__ in found and hasattr(module, "caption"):
        layout["captions"] = {"scores at the end": _lines(r"captioning/(?!loss$).+")}
    if routing := routing_layout(module):
        layout["routing"] = {title: [kind, [f"{tag}$" for tag in tags]] for title, (kind, tags) in routing.items()}
    if "WiseFT" in found:
        layout["WiSE-FT"] = {
            "alpha chosen on in-domain validation": _lines("wise_ft/chosen_alpha"),
            "change at the chosen alpha": _lines("wise_ft/(in_domain|out_of_domain)_delta"),
        }
    if "Spectra" in found:
        layout["spectra"] = {
            "mean alpha of the layers with a power law": _lines("spectra/alpha(_before)?"),
            "share of the layers with a power law": _lines("spectra/power_law"),
            "alpha by layer": _lines("spectra_alpha/.+"),
        }
    layout["the run itself"] = {"learning rates": _lines(r"lr-[^()]+")}
    if Guards.__name__ in found:
        layout["the run itself"]["skipped steps, loss spikes (none: no line)"] = _lines("guards/.+")
    return layout


def log_hyperparameters(
    board: TensorBoardLogger, hyperparameters: Mapping[str, Any], metrics: Sequence[str], first: Sequence[str]
) -> None:
    """Log what was chosen, so that the HParams tab compares runs by what tells them apart.

    The tab shows five hyperparameters unasked: those marked as differing, then by name. A run that has just started
    does not know the others, so what usually tells runs apart is marked. Metrics are shown in the order given.

    Args:
        board: the run's.
        hyperparameters: name to bool, number or text.
        metrics: tags of the scalars that runs are judged by, whose last value is shown.
        first: names of the hyperparameters to mark.
    """
    board.log_hyperparams(hyperparameters)  # hparams.yaml; without metrics it writes nothing else
    experiment, *session = hparams(dict(hyperparameters), dict.fromkeys(metrics, 0.0))
    held = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(held.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in first
    held.content = data.SerializeToString()
    for summary in (experiment, *session):
        board.experiment._get_file_writer().add_summary(summary)


def _domain(domain: str, names: Sequence[str], *, wise_ft: bool) -> dict[str, list]:
    summary = "in_domain_delta" if domain == "in" else "out_of_domain_delta"
    escaped = [re.escape(name) for name in names]
    charts = {
        "k-NN accuracy": _lines(*(f"knn/{name}" for name in escaped)),
        "change against pretrained": _lines(*(f"knn_delta/{name}" for name in escaped)),
        "mean change": _lines(f"summary/{summary}"),
    }
    # A band needs three tags, as they are, in this order: the value, its lower and its upper limit.
    charts |= {
        f"change of {name}, 95 % band": ["Margin", [f"knn_delta{part}/{name}" for part in ("", "_low", "_high")]]
        for name in names
    }
    if wise_ft:
        charts["WiSE-FT: accuracy over alpha, in %"] = _lines(*(f"wise_ft/{name}" for name in escaped))
    return charts


def _losses(module: nn.Module) -> dict[str, list]:
    """Return a chart of what is minimised, one of each part that the approach has, and one of whatever is added."""
    charts = {"what is minimised: training, held out": _lines("(train|val)/loss")}
    objective = getattr(module, "objective", None)
    parts = {
        "reconstruction": getattr(objective, "reconstruction_weight", 0) and not getattr(module, "untouched", False),
        "contrastive": getattr(objective, "contrastive_weight", 0) and hasattr(module, "head"),
        "captioning": hasattr(module, "caption"),
    }
    charts |= {name: _lines(f"(train|val)/{name}") for name, there in parts.items() if there}
    spec = getattr(getattr(module, "regularizer", None), "spec", None)
    if routing_layout(module) or any(getattr(spec, name, 0) for name in ("distill", "l2sp", "replay")):
        charts["what is added to it"] = _lines("train/(?!(loss|reconstruction|contrastive|captioning)$).+")
    return charts


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", [f"{tag}$" for tag in tags]]


def _has_shared_space(module: nn.Module) -> bool:
    """Whether the approach embeds pictures and captions: it has a head of its own for it, which learns."""
    return hasattr(module, "head") and bool(getattr(getattr(module, "objective", None), "contrastive_weight", True))
