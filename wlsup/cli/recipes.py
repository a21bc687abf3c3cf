"""Reading recipes far enough to know which approach is meant, without importing torch."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from wlsup.approaches import APPROACHES
from wlsup.errors import WlsupError, choose

__all__ = ["approach_named_in", "eval_sets_named", "holds_run", "knn_options"]


def holds_run(folder: Path) -> bool:
    """Whether a folder is a run's, with weights: it has a configuration and checkpoints."""
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def knn_options(folder: Path) -> dict[str, Any]:
    """Return k and temperature of a run's own k-NN, as far as its configuration names them."""
    knn = _recipe(folder / "config.yaml").get("knn") or {}
    return {name: knn[name] for name in ("k", "temperature") if name in knn}


def eval_sets_named(text: str | None) -> list[Any] | None:
    """Return the evaluation sets that ``--sets`` names: by name, at commas, or those of a recipe (YAML).

    Args:
        text: "svhn,dtd", or the path of a file with ``data: {eval_sets: [...]}``; None for none named.

    Raises:
        WlsupError: there is no such file, or it has no sets, or one of them is not well described.
    """
    if text is None or not text.endswith((".yaml", ".yml")):
        return None if text is None else [name.strip() for name in text.split(",")]
    from wlsup.data.evalsets import EvalSetSpec

    entries = (_recipe(Path(text)).get("data") or {}).get("eval_sets")
    if not isinstance(entries, list) or not entries:
        raise WlsupError(
            f"{text} names no evaluation sets: it needs data: {{eval_sets: [...]}}, as a run's recipe has."
        )
    known = [field.name for field in fields(EvalSetSpec)]
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            for key in entry:
                choose(f"key of an evaluation set in {text}", str(key), known)
            if "name" not in entry:
                raise WlsupError(f"{text}: an evaluation set has no name: {entry}.")
        found.append(EvalSetSpec(**entry) if isinstance(entry, dict) else str(entry))
    return found


def approach_named_in(arguments: list[str]) -> str:
    """Return the approach that recipes and options name; the last one wins, as with every other key.

    Raises:
        WlsupError: none named, an unknown one, or a recipe that is not there (then with the valid approaches).
    """
    named = None
    position = 0
    while position < len(arguments):
        option, _, value = arguments[position].partition("=")
        if option in ("-c", "--config", "--approach"):
            if not value:
                position += 1
                value = arguments[position] if position < len(arguments) else ""
            named = value if option == "--approach" else _recipe(Path(value)).get("approach", named)
        position += 1
    if named is None and "--help-all" in arguments:
        return next(iter(APPROACHES))
    if named is None:
        raise WlsupError(
            "No approach is named. Give --approach NAME or a recipe with `approach: NAME`. "
            f"Valid: {', '.join(APPROACHES)}."
        )
    return choose("approach", named, APPROACHES, hint="`wlsup approaches` says what each one is.")


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if path.suffix == ".yaml" and path.parent.is_dir() and path.stem not in APPROACHES:
            choose("approach", path.stem, APPROACHES, hint=f"(There is no recipe {path}.)")
        raise WlsupError(f"No recipe {path} (looked in {Path.cwd()}). Give the path of a YAML file with -c.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WlsupError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise WlsupError(f"The recipe {path} must be a YAML mapping of keys to values, not {type(recipe).__name__}.")
    return recipe
