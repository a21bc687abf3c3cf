"""Reading finished runs: whatever lies in a run's folder, and what does not."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from wlsup.errors import WlsupError

__all__ = ["Run", "find_runs", "flat", "read_run", "read_runs"]

_NEEDED = {"approach": str, "preset": str, "seed": int, "knn": dict, "parameters": dict, "captions": dict}
_SERIES = ("train/loss", "val/loss", "retrieval/image_to_text_R@1")


@dataclass(frozen=True)
class Run:
    """What one run left behind; a piece that is not there is empty.

    Args:
        folder: where it lies.
        results: results.json.
        cost: cost.json.
        plan: plan.json.
        environment: env.json.
        config: config.yaml as text.
        options: config.yaml, flat, by dotted key.
        series: figures along training by name: [(step, value)], steps ascending.
        wise_ft: wise_ft.json.
        spectra: spectra.json.
        evaluation: evaluation.json.
        problems: files that are there and cannot be read, and why.
    """

    folder: Path
    results: dict[str, Any]
    cost: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    options: dict[str, str] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    wise_ft: dict[str, Any] = field(default_factory=dict)
    spectra: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Of everything in the run."""
        return self.results["seed"]


def find_runs(places: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Return the folders of the finished runs at or below ``places``, each once, and of those that have no results.

    Args:
        places: runs' folders, or folders above them.

    Raises:
        WlsupError: a place is not there, or below all of them there is no finished run.
    """
    finished: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    places = list(places)
    for place in places:
        if not place.is_dir():
            raise WlsupError(
                f"No folder {place}. Give a run's folder (it holds results.json), or a folder above several runs."
            )
        for name, found in (("results.json", finished), ("config.yaml", unfinished)):
            for file in sorted(place.rglob(name)):
                if not (file.parent / "adapter_config.json").is_file():  # of `wlsup export --adapter-only`: no run
                    found.setdefault(file.parent.resolve(), file.parent)
    if not finished:
        where = ", ".join(map(str, places))
        raise WlsupError(f"No finished run in {where}: a run that is done has its results.json. Run `wlsup fit` first.")
    return list(finished.values()), [folder for key, folder in unfinished.items() if key not in finished]


def read_runs(
    folders: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> tuple[list[Run], dict[str, str]]:
    """Read runs; return them, and by folder why one was left out.

    Args:
        folders: of finished runs.
        progress: called with (done, total).

    Raises:
        WlsupError: none of them can be read.
    """
    runs, refused = [], {}
    for done, folder in enumerate(folders, start=1):
        try:
            runs.append(read_run(folder))
        except WlsupError as error:
            refused[str(folder)] = str(error)
        if progress:
            progress(done, len(folders))
    if not runs:
        raise WlsupError("None of the runs can be read. " + " ".join(refused.values()))
    return runs, refused


def read_run(folder: Path) -> Run:
    """Read one run's folder.

    Raises:
        WlsupError: results.json is damaged or lacks what every run writes.
    """
    problems: list[str] = []
    results = _results(folder / "results.json")
    pieces = {
        attribute: _optional(folder / name, read, problems) or {}
        for attribute, name, read in (
            ("cost", "cost.json", _json_object),
            ("plan", "plan.json", _plan),
            ("environment", "env.json", _json_object),
            ("wise_ft", "wise_ft.json", _wise_ft),
            ("spectra", "spectra.json", _spectra),
            ("evaluation", "evaluation.json", _evaluation),
        )
    }
    config = _optional(folder / "config.yaml", lambda path: path.read_text(encoding="utf-8"), problems) or ""
    options = _optional(folder / "config.yaml", _options, problems) or {}
    series = _optional(folder / "metrics.csv", _series, problems) or {}
    return Run(
        folder,
        results,
        config=config,
        options=options,
        series=series,
        problems=tuple(dict.fromkeys(problems)),
        **pieces,
    )


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Return a nested mapping's leaves as text, by dotted key."""
    if isinstance(value, dict) and value:
        return {key: leaf for name, child in value.items() for key, leaf in flat(child, f"{prefix}{name}.").items()}
    return {prefix[:-1]: str(value)}


def _results(path: Path) -> dict[str, Any]:
    try:
        results = _json_object(path)
    except (OSError, ValueError) as error:
        raise WlsupError(f"{path} is not a run's results ({error}). Leave the run out, or run it again.") from error
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(results.get(key), kind)]
    wrong += [
        f"knn.{name}" for name, entry in (results["knn"].items() if "knn" not in wrong else ()) if not _is_entry(entry)
    ]
    if wrong:
        raise WlsupError(
            f"{path} lacks {', '.join(wrong)}, or holds something else there, so it is no run's results. Leave it out, "
            "or run it again."
        )
    return results


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("domain") not in ("in", "out"):
        return False
    numbers = [entry.get(key) for key in ("pretrained", "finetuned", "delta")]
    interval = entry.get("ci95", [0.0, 0.0])  # a table that a run was put together from again may have kept none
    whole = isinstance(interval, list) and len(interval) == 2 and isinstance(entry.get("test", 1), int)
    return whole and all(isinstance(n, int | float) and math.isfinite(n) for n in [*numbers, *interval])


def _optional(path: Path, read: Callable[[Path], Any], problems: list[str]) -> Any:
    if not path.is_file():
        return None
    try:
        return read(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name}: {' '.join(str(error).split())}")
    except (LookupError, TypeError, AttributeError) as error:
        problems.append(f"{path.name}: it lacks what this report reads there ({type(error).__name__}: {error})")
    return None


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _plan(path: Path) -> dict[str, Any]:
    plan = _json_object(path)
    for rule in plan["rules"]:
        _ = [rule[key] for key in ("pattern", "trains", "lr", "weight_decay", "tensors", "parameters")]
    _ = [base["id"] + base["sha256"] for base in plan["bases"].values()]
    return plan


def _wise_ft(path: Path) -> dict[str, Any]:
    curve = _json_object(path)
    for entry in curve["sets"].values():
        for position in range(len(curve["alphas"])):
            _ = entry["domain"], float(entry["delta"][position]), [float(end) for end in entry["ci95"][position]]
    return curve


def _spectra(path: Path) -> dict[str, Any]:
    spectra = _json_object(path)
    for layer in spectra["layers"]:
        _ = layer["name"], list(layer["shape"])
        for metrics in (layer["before"], layer["after"]):
            if metrics and metrics.get("power_law"):
                float(metrics["alpha"])
    return spectra


def _evaluation(path: Path) -> dict[str, Any]:
    evaluation = _json_object(path)
    for entry in evaluation.get("sets", {}).values():
        for row in entry.get("classes") or []:
            _ = row["class"], row["n"], row["pretrained"], row["finetuned"], row["delta"]
    if retrieval := evaluation.get("retrieval"):
        _ = retrieval["pairs"], [float(value) for value in retrieval["chance"].values()]
    return evaluation


def _options(path: Path) -> dict[str, str]:
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a YAML mapping")
    return flat(value)


def _series(path: Path) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name in _SERIES:
                if row.get(name) and row.get("step"):
                    value = float(row[name])
                    if math.isfinite(value):
                        series.setdefault(name, {})[int(float(row["step"]))] = value
    return {name: sorted(points.items()) for name, points in series.items()}
