"""One sentence that lists all a recipe needs and this machine does not have, before anything is built or fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wlsup.data.catalog import CATALOG
from wlsup.data.evalsets import locate_eval_set
from wlsup.data.locate import data_root, fetched_paths
from wlsup.errors import WlsupError

__all__ = ["refuse_what_lacks"]

# source -> catalogue entries that bring its captions and its pictures
_FETCHED = {
    "coco": ("coco", "coco"),
    "conceptual_captions": ("cc3m", "cc3m"),
    "imagenet_captions": ("imagenet_captions", "imagenet"),
    "imagenet_class_names": (None, "imagenet"),
}
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def refuse_what_lacks(config: Any) -> None:
    """Refuse a run that lacks several things, data among them, with the whole list.

    One lacking thing is left to whoever needs it, whose message says more; and weights alone to the download.

    Args:
        config: the parsed configuration, not yet made into objects.

    Raises:
        WlsupError: naming all files, sets and weights, and how to get each.
    """
    data = _lacking_pairs(config) + _lacking_sets(config)
    if not data:
        return
    lacking = data + _lacking_weights(config)
    if len(lacking) < 2 and not lacking[0].startswith("the eval sets") and "wlsup data fetch" not in lacking[0]:
        return
    raise WlsupError(
        f"This run needs what is not on this machine: fetch {', '.join(lacking[:-1])}"
        f"{' and ' if len(lacking) > 1 else ''}{lacking[-1]}, or set these options to where it lies."
    )


def _lacking_pairs(config: Any) -> list[str]:
    fetched = _FETCHED.get(config.get("data.source"), (None, None))
    lacking: dict[str, list[str]] = {}
    given = {option: config.get(f"data.{option}") for option in ("captions", "images")}
    if not any(given.values()):
        root = data_root(config.get("data.root"))
        given = dict(zip(given, fetched_paths(str(config.get("data.source")), root), strict=True))
    for option, what, entry in zip(("captions", "images"), ("captions", "pictures"), fetched, strict=True):
        paths = given[option] or []
        for path in [paths] if isinstance(paths, str) else paths:
            if not Path(path).expanduser().exists():
                lacking.setdefault(_how(entry), []).append(f"the {what} {path} (data.{option})")
    return [f"{' and '.join(names)}{how}" for how, names in lacking.items()]


def _lacking_sets(config: Any) -> list[str]:
    names = []
    for entry in config.get("data.eval_sets") or []:
        if not isinstance(entry, str):
            continue  # a set of one's own: its builder says what is wrong with it
        try:
            locate_eval_set(entry, config.get("data.root"))
        except WlsupError:
            if entry not in CATALOG:
                raise
            names.append(entry)
    if len(names) < 2:
        return [f"the eval set {name}{_how(name)} (data.root)" for name in names]
    return [f"the eval sets {', '.join(names)} (`wlsup data fetch NAME` for each; data.root)"]


def _how(entry: str | None) -> str:
    if entry is None:
        return ""
    return f" by `wlsup data fetch {entry}`" + (", in part by hand" if CATALOG[entry].by_hand else "")


def _lacking_weights(config: Any) -> list[str]:
    lacking = []
    for part in ("encoder", "text", "language"):
        weights = config.get(f"model.{part}.weights")
        if not weights or weights == "mini" or config.get(f"model.{part}.pretrained") is False:
            continue
        if Path(weights).expanduser().exists():
            continue
        repository = _repository(weights)
        if repository is None:
            lacking.append(f"the weights {weights} (model.{part}.weights)")
        elif not _in_cache(repository):
            lacking.append(f"the weights {weights} (model.{part}.weights) by `hf download {repository}`")
    return lacking


def _repository(weights: str) -> str | None:
    """Return the hub repository of weights: a hub id's own, or that of a timm name."""
    name = weights.split(":", 1)[1].partition("@")[0] if weights.startswith(("hf-hub:", "hf_hub:")) else weights
    if "/" in name:
        return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else None
    import timm

    known = timm.models.get_pretrained_cfg(name) if name.partition(".")[0] in timm.list_models() else None
    return known.hf_hub_id if known is not None else None


def _in_cache(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in _WEIGHT_FILES)
