"""What an epoch of `wlsup fit` takes on cached features, over one that reads, decodes and encodes its pictures.

Run:  python benchmarks/feature_cache.py [--json] [--only NAME ...] [--encoder S|B|L] [--pictures 256] [--batch 32]

Whole epochs of the command that a user types, of the same recipe with `--data.cache_features` false and true: JPEGs of
480 x 360 on disk, a ViT at 224 with random weights, callbacks, guards and TensorBoard as ever; nothing is validated or
evaluated. An epoch's seconds are those between the logs of two epochs' last steps; the first epoch, with the start of
workers and the filling of the cache, is left out, and the fastest of the others counts. Bar: a hundredth.

The language model of linear_map runs in both: --pool says over how few positions (see approaches.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from paper import make_pictures  # noqa: E402

NAMES = ("lit", "linear_map", "selective_k")
SIZES = {"S": "small", "B": "base", "L": "large"}
BAR = 0.01
HELD_OUT = 8


def make_encoder(size: str, folder: Path) -> tuple[str, Path]:
    """Write random weights as timm does; return the architecture's name and the file."""
    import timm

    name = f"vit_{SIZES[size]}_patch16_224"
    torch.manual_seed(0)
    torch.save(timm.create_model(name, num_classes=0).state_dict(), folder / "vision.pt")
    return name, folder / "vision.pt"


def epoch_seconds(run: Path) -> list[float]:
    """Return the seconds between the logs of the last steps of an epoch and the next one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    times = [event.wall_time for event in events.Scalars("train/loss")]
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def fit(
    name: str, cached: bool, folder: Path, encoder: tuple[str, Path], options: argparse.Namespace
) -> dict[str, Any]:
    """Run the command; return its epochs' seconds, or what went wrong."""
    run = folder / f"{name}-{cached}"
    command = [sys.executable, "-m", "wlsup", "fit"]
    for recipe in ("base", name):
        command += ["-c", str(ROOT / f"experiments/{recipe}.yaml")]
    values = {
        "run_dir": run,
        "model.encoder.architecture": encoder[0],
        "model.encoder.weights": encoder[1],
        "data.source": "table",
        "data.captions": folder / "captions.csv",
        "data.images": folder / "images",
        "data.pairs": options.pictures,
        "data.validation_pairs": HELD_OUT,
        "data.eval_sets": "[]",
        "data.batch_size": options.batch,
        "data.num_workers": options.workers,
        "data.cache_features": str(cached).lower(),
        "trainer.max_epochs": options.cached_epochs if cached else options.epochs,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": options.pictures // options.batch,
        "reconstructions.pictures": 0,
        "captioning.pictures": 0,
        "captioning.samples": 0,  # they would be captioned from their pictures after every epoch
    }
    if options.precision:
        values["trainer.precision"] = options.precision
    if name == "linear_map":
        values |= {"model.prefix.pool": options.pool, "model.compare": "false"}
    if name == "selective_k":
        values |= {"model.k": 0, "model.criterion": "last"}  # trains no part of the encoder, and asks for no pictures
    for option, value in values.items():
        command += [f"--{option}", str(value)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]}
    return {"epochs": epoch_seconds(run)}


def main() -> int:
    """Print the table, or with --json one JSON object; exits with 1 when the bar is missed or a run fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--encoder", choices=SIZES, default="S", help="ViT-S/16 (default), B/16 or L/16")
    parser.add_argument("--pictures", type=int, default=256, help="of an epoch (default: 256)")
    parser.add_argument("--batch", type=int, default=32, help="pairs a step (default: 32)")
    parser.add_argument("--workers", type=int, default=0, help="that read pictures (default: 0)")
    parser.add_argument("--epochs", type=int, default=3, help="without the cache (default: 3)")
    parser.add_argument("--cached-epochs", type=int, default=12, help="with it (default: 12)")
    parser.add_argument("--precision", help="the trainer's, such as 16-mixed (default: fp32)")
    parser.add_argument(
        "--pool", type=int, default=2, help="linear_map averages squares of so many patches (default: 2)"
    )
    options = parser.parse_args()
    if options.pictures % options.batch or min(options.epochs, options.cached_epochs) < 2:
        parser.error("--pictures must be a multiple of --batch, and two epochs are the least")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = make_encoder(options.encoder, folder)
        make_pictures(folder, options.pictures + HELD_OUT)
        for one in options.only:
            row: dict[str, Any] = {"name": one}
            for cached in (False, True):
                found = fit(one, cached, folder, encoder, options)
                row |= {("cached_" if cached else "") + key: value for key, value in found.items()}
                print(f"measured {one}, {'cached' if cached else 'from pictures'}", file=sys.stderr, flush=True)
            if "epochs" in row and "cached_epochs" in row:
                row["ratio"] = min(row["cached_epochs"]) / min(row["epochs"])
                row["met"] = row["ratio"] <= BAR
            rows.append(row)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    report = {key: value for key, value in vars(options).items() if key not in ("json", "only")}
    report |= {"bar": BAR, "torch": torch.__version__, "device": device, "rows": rows}
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"ViT-{options.encoder}/16, {options.pictures:,} pictures, batch {options.batch}, {device}\n")
        print(f"{'':12} {'s/epoch':>9} {'cached':>9} {'ratio':>9}")
        for row in rows:
            if "ratio" not in row:
                print(f"{row['name']:12} failed: {row.get('error', row.get('cached_error', ''))}")
                continue
            verdict = "met" if row["met"] else "MISSED"
            fastest, cached = min(row["epochs"]), min(row["cached_epochs"])
            print(f"{row['name']:12} {fastest:9.3f} {cached:9.4f} {row['ratio']:8.4f}x {verdict}")
    return int(not all(row.get("met") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
