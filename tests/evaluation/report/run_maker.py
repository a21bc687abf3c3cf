"""Run folders with every piece a run can have, made up, in no time."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

SETS = {"mini_shapes": "in", "mini_digits": "out", "mini_textures": "out"}
ALPHAS = [round(0.1 * step, 1) for step in range(11)]


def make_run(root: Path, approach: str, seed: int, /, *, whole: bool = True, events: bool = False, **change) -> Path:
    """Write one run; ``change`` replaces top-level keys of results.json, ``options`` those of config.yaml."""
    options = change.pop("options", {})
    random = np.random.default_rng([seed, *approach.encode()])
    folder = root / approach / f"seed{seed}"
    folder.mkdir(parents=True)
    level = {"lit": 0.0}.get(approach, 0.02 + 0.02 * (sum(approach.encode()) % 3))
    knn = {}
    for place, (name, domain) in enumerate(SETS.items()):
        sign = -1 if domain == "in" else 1
        delta = 0.0 if not level else float(np.round(sign * level * (1 + place) + random.normal(0, 0.01), 4))
        half = 0.0 if not level else 0.03
        knn[name] = {
            "domain": domain, "k": 20, "temperature": 0.07, "train": 1000, "test": 500, "pretrained": 0.4,
            "finetuned": 0.4 + delta, "delta": delta, "ci95": [delta - half, delta + half],
        }  # fmt: skip
    results = {
        "approach": approach, "preset": "mini", "seed": seed, "steps": 60, "samples_seen": 3840,
        "seconds": 100.0 + seed,
        "parameters": {"total": 1000000, "trained": 120000},
        "captions": {"source": "mini", "pairs": 640, "manifest_sha256": "ab" * 32, "skipped": {}},
        "knn": knn, "protocol": "knn-dino:v1 cosine T=0.07 k=20 weighted",
        "summary": {"in_domain_delta": knn["mini_shapes"]["delta"], "out_of_domain_delta": 0.0},
        "retrieval": {
            "pairs": 64, "chance": {"1": 1 / 64, "5": 5 / 64, "10": 10 / 64},
            "image_to_text": {"1": 0.125 + seed / 64, "5": 0.3, "10": 0.5},
            "text_to_image": {"1": 0.1, "5": 0.3, "10": 0.5},
        },
        "task": {"title": "A task", "note": "a note",
                 "rows": [{"what": "this program", "value": 29.4 + seed, "unit": "%", "chance": 10.0}]},
        "captioning": {
            "generation": "greedy", "pictures": 16, "references": 80, "absent": {},
            "scores": {"bleu_1": {"value": 0.5, "ci95": [0.4, 0.6]}, "loss": {"value": 1.7, "ci95": [1.6, 1.8]}},
            "samples": [{"key": "mini/0", "generated": "a red star", "references": ["a star", "one red star"]}],
        },
        **change,
    }  # fmt: skip
    write(folder / "results.json", results)
    if not whole:
        return folder
    write(folder / "cost.json", {
        "seconds": 100.0, "processor_seconds": 200.0 + 10 * seed, "peak_memory_mib": {"resident": 1300.5, "gpu": None},
    })  # fmt: skip
    write(folder / "plan.json", {
        "approach": approach, "bases": {"encoder": {"id": "mini", "sha256": "cd" * 32}}, "trained": 120000,
        "total": 1000000, "rules": [
            {"pattern": "adapter.*", "trains": True, "lr": 1e-3, "weight_decay": 0.05, "tensors": 4,
             "parameters": 120000},
            {"pattern": "mae.*", "trains": False, "lr": None, "weight_decay": None, "tensors": 9, "parameters": 880000},
        ],
    })  # fmt: skip
    write(folder / "env.json", {
        "versions": {"wlsup": "0.1.0", "torch": "2.14.1"}, "python": "3.11.7", "git_commit": "f" * 40,
        "platform": "Linux", "cpu_count": 2, "gpus": [], "command": ["wlsup", "fit"],
    })  # fmt: skip
    config = {"seed_everything": seed, "approach": approach, "preset": "mini", "run_dir": str(folder),
              "model": {"lr": 1e-3, "regularizer": {"distill": 0.0}}, "data": {"pairs": 640, "seed": seed},
              "trainer": {"max_epochs": 3}}  # fmt: skip
    for key, value in options.items():
        node = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["step", "train/loss", "val/loss", "retrieval/image_to_text_R@1"])
        rows.writeheader()
        for step in range(0, 60, 5):
            rows.writerow({"step": step, "train/loss": 4 - step / 30 + 0.1 * seed})
            if step % 20 == 0:
                rows.writerow({"step": step, "val/loss": 4 - step / 40, "retrieval/image_to_text_R@1": step / 600})
    if level:
        write(folder / "wise_ft.json", wise_ft(knn))
        write(folder / "spectra.json", spectra())
    write(folder / "evaluation.json", evaluation(seed))
    for name in SETS:
        for kind, rank, label in (("helped", 1, "star"), ("hurt", 1, "ring")):
            for number in range(3):
                path = folder / "classes" / name / f"{kind}-{rank}-{label}-{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    if events:
        log_pictures(folder)
    return folder


def write(path: Path, value: object) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value))


def wise_ft(knn: dict) -> dict:
    """Return a curve that bends: most is gained half way."""
    sets = {}
    for name, entry in knn.items():
        deltas = [entry["delta"] * alpha + (0.05 * alpha * (1 - alpha)) for alpha in ALPHAS]
        sets[name] = {
            "domain": entry["domain"], "metric": "knn", "accuracy": [0.4 + d for d in deltas], "delta": deltas,
            "ci95": [[d - 0.03 * (a > 0), d + 0.03 * (a > 0)] for d, a in zip(deltas, ALPHAS, strict=True)],
        }  # fmt: skip
    return {"alphas": ALPHAS, "sets": sets, "validation": {"sets": ["mini_shapes"], "accuracy": [0.4] * 11},
            "chosen_alpha": 0.3, "rule": "the largest alpha that loses nothing", "protocol": "wise-ft:v1"}  # fmt: skip


def spectra() -> dict:
    """Return four layers, one of which follows no power law."""

    def metrics(alpha: float | None) -> dict:
        return {"alpha": alpha, "D": 0.05, "tail": 30, "alpha_weighted": 2.0, "log_norm": 1.0, "rand_distance": 0.3,
                "num_spikes": 2, "power_law": alpha is not None, "why": None if alpha else "D above 0.1"}  # fmt: skip

    layers = [
        {"name": f"blocks.{i}.mlp.fc1", "shape": [128, 512], "before": metrics(3.0 + i), "after": metrics(2.5 + i)}
        for i in range(3)
    ]
    layers.append({"name": "blocks.3.mlp.fc1", "shape": [128, 512], "before": None, "after": metrics(None)})
    return {"protocol": "spectra:v1 weightwatcher", "layers": layers, "summary": {}, "skipped": []}


def evaluation(seed: int) -> dict:
    """Return a probe, calibration, drift and classes."""

    def figures(value: float) -> dict:
        """Return a figure as `compare` makes it."""
        after = value + seed / 100
        return {
            "pretrained": value, "pretrained_ci95": [value - 0.02, value + 0.02], "finetuned": after,
            "finetuned_ci95": [after - 0.02, after + 0.02], "delta": after - value, "ci95": [-0.03, 0.03],
        }  # fmt: skip

    scores = {
        name: figures(value) for name, value in (("ece", 0.1), ("adaptive_ece", 0.12), ("nll", 1.4), ("brier", 0.6))
    }
    entry = {
        "domain": "in",
        "probe": {"pretrained": 0.5, "finetuned": 0.55 + seed / 100, "delta": 0.05 + seed / 100, "ci95": [0.01, 0.09]},
        "calibration": {"knn": scores, "probe": scores},
        "drift": {"cka": 0.93, "cka_ci95": [0.9, 0.95], "knn_overlap": 0.6, "knn_overlap_ci95": [0.5, 0.7], "k": 10},
        "classes": [
            {"class": name, "n": 50, "pretrained": 0.5, "finetuned": 0.5 + delta, "delta": delta + seed / 100,
             "ci95": [delta - 0.1, delta + 0.1], "p_holm": 0.04}
            for name, delta in (("star", 0.3), ("disc", 0.0), ("ring", -0.3))
        ],
    }  # fmt: skip
    return {"protocol": {"probe": "probe:v1", "drift": "drift:v1"}, "sets": dict.fromkeys(SETS, entry)}


def log_pictures(folder: Path) -> None:
    """Log grids as the callbacks do, at the start and at the end."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as board:
        for step in (0, 30, 60):
            for tag in ("reconstructions", "captions"):
                board.add_image(tag, torch.rand(3, 40, 80), step)
