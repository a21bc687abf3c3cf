"""Who waits for whom: the share of training and of k-NN extraction spent on waiting for the next batch.

Run:  python benchmarks/loader.py [--captions FILE --images DIR|TAR] [--workers N] [--quick] [--json]

Three jobs, each through the product's own code: `film` trained at the mini encoder's 64 px and with ViT-S/16 at 224
(random weights: they change no time), by Lightning's Trainer under its SimpleProfiler; and the features of ViT-S/16 at
224, as k-NN extracts them. "waiting" is the profiler's time in the loader's next batch, over that and the time in the
model; of the extraction it is all but the model's forward passes. The first batch is left out of training: it starts
the workers. With no workers, the default, reading is not hidden behind the model: waiting is then the whole cost of it.

Without --captions and --images, pictures with a photograph's spectrum are generated: JPEGs of 256 px shorter side.

Bar: waiting <= 10% of the time of each job.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import torch
from decode import enlarged, photographs
from lightning.pytorch.profilers import SimpleProfiler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wlsup.approaches.film import FilmApproach
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.decoders import decoders_used
from wlsup.data.evalsets import LabelledPictures
from wlsup.data.stores import open_store
from wlsup.evaluation.features import extract_features
from wlsup.models.vision import VisionSpec, build_vision

VIT_S = VisionSpec(architecture="vit(img_size=224,patch_size=16,embed_dim=384,depth=12,num_heads=6)", pretrained=False)
BAR = 0.10
NEXT, STEP = "[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"


def generate(folder: Path, number: int) -> tuple[Path, Path]:
    """Write JPEGs and a table of captions; return table and folder."""
    images, table = folder / "images", folder / "captions.csv"
    images.mkdir()
    with open(table, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for i, picture in enumerate(photographs(Path(), number)):
            (images / f"{i:04d}.jpg").write_bytes(enlarged(picture, 256))
            rows.writerow([f"{i:04d}.jpg", f"a picture of noise number {i}"])
    return table, images


def share(waiting: list[float], model: list[float]) -> dict[str, float]:
    """Return the share of waiting and what each step takes."""
    total = sum(waiting) + sum(model)
    return {
        "waiting": sum(waiting) / total,
        "waiting_ms": 1e3 * sum(waiting) / len(model),
        "model_ms": 1e3 * sum(model) / len(model),
        "steps": len(model),
    }


def train(
    encoder: VisionSpec, batch_size: int, steps: int, captions: Path, images: Path, workers: int
) -> dict[str, float]:
    """Train film for some steps."""
    lightning.seed_everything(0, verbose=False)
    data = CaptionDataModule(
        "table",
        captions=str(captions),
        images=str(images),
        validation_pairs=0,
        batch_size=batch_size,
        num_workers=workers,
    )
    profiler = SimpleProfiler()
    lightning.Trainer(
        max_steps=steps + 1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        profiler=profiler,
    ).fit(FilmApproach(encoder), data)
    times = profiler.recorded_durations
    return share(times[NEXT][1 : steps + 1], times[STEP][1:])


def extract(batch_size: int, pictures: int, images: Path, workers: int) -> dict[str, float]:
    """Extract the features of some pictures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = build_vision(VIT_S).eval().to(device)
    store = open_store(images)
    names = store.names()[:pictures]
    dataset = LabelledPictures(store, names, [0] * len(names), encoder.image_spec)
    forward = []

    def features(batch: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        rows = encoder.features(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        forward.append(time.perf_counter() - begin)
        return rows

    features(torch.zeros(batch_size, 3, 224, 224, device=device))  # once before, to warm up
    forward.clear()
    begin = time.perf_counter()
    extract_features(features, dataset, batch_size=batch_size, num_workers=workers, device=device)
    return share([time.perf_counter() - begin - sum(forward)], forward)


def main() -> int:
    """Print the table; exit 1 if a job waits too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="a table of captions, as the source `table` reads it")
    parser.add_argument("--images", type=Path, help="the pictures it names: a folder, tar or zip")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (the product's default, 0)")
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args()
    if (options.captions is None) != (options.images is None):
        parser.error("give --captions and --images, or neither")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    few = options.quick
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        captions, images = options.captions, options.images
        if captions is None:
            captions, images = generate(Path(name), 64 if few else 256)
        pairs = captions, images, options.workers
        jobs = {
            "film, mini encoder at 64": lambda: train(VisionSpec(), 64 if not few else 16, 4 if few else 30, *pairs),
            "film, ViT-S/16 at 224": lambda: train(VIT_S, 8, 2 if few else 4, *pairs),
            "k-NN features, ViT-S/16 at 224": lambda: extract(16, 32 if few else 160, *pairs[1:]),
        }
        for label, job in jobs.items():
            rows[label] = row = job()
            if not options.json:
                print(
                    f"{label:<32} waiting {100 * row['waiting']:.1f}% of the time ({row['waiting_ms']:.0f} ms a step, "
                    f"model {row['model_ms']:.0f} ms; {row['steps']} steps)",
                    flush=True,
                )
    missed = [label for label, row in rows.items() if row["waiting"] > BAR]
    if options.json:
        summary = {"rows": rows, "bar": BAR, "missed": missed, "workers": options.workers, "decoders": decoders_used()}
        print(json.dumps(summary, indent=2))
    else:
        print(f"bar {100 * BAR:.0f}% missed by: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
