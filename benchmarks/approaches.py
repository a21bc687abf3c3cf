"""What a training step of each approach costs: pictures a second, and the memory its activations take at the peak.

Run:  python benchmarks/approaches.py [--json] [--quick] [--only NAME ...] [--precision bf16] [--encoder B|L]

ViT-S/16 at 224 with fresh weights (a step costs the same whatever they are), fp32, on one thread or the first GPU. Each
approach runs in a fresh process (on a GPU, whose memory is counted apart, all in this one): one step to warm up, then
--steps, each forward, backward and AdamW. Where an approach has both branches, only the contrastive one runs, so that
all rows encode the same full pictures; approaches with another objective run their own. Memory is the peak during
forward and backward above what is held before (weights, optimizer states): resident memory on a CPU (Linux), allocated
memory on a GPU. Peers: full fine-tuning, and peft's LoRA on the bare timm model. Bars: lst at most 0.18x the memory of
full, adapters in the top four blocks 0.25x; a step on cached features (of 10) at most 0.01x the time of one without,
both timed apart from memory: to count it, freed memory is given back at once, which costs a short step half its time.
linear_map's language model runs in both: the mini one's forward and backward take 0.20 GFLOP a picture over 49 patches,
ViT-S/16's forward 8.5, ViT-B/16's 34: on S it cannot meet it, on B with a batch that fills a step (--encoder B --batch
32); over four positions made of the pooled feature it takes a quarter.
Checkpointed: with --model.encoder.gradient_checkpointing true.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wlsup.approaches import APPROACHES, approach_class
from wlsup.batch import CaptionBatch
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.feature_cache import what_is_kept
from wlsup.errors import WlsupError
from wlsup.models.prefix import PrefixSpec
from wlsup.models.vision import VisionSpec
from wlsup.optim import build_optimizer

SIZE = 224
ENCODERS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, depth, heads
PRECISIONS = {"32": None, "16": torch.float16, "bf16": torch.bfloat16}  # autocast's
CAPTIONS = ("a red square left of a blue circle", "two green stars on sand", "a small ring above the water")
PEER = "peft LoRA on timm"
CHECKPOINTED = {"gradient_checkpointing": True}
VARIANTS = {
    "film, top 4": ("film", {"top": 4}, {}),
    "bottleneck, top 4": ("bottleneck", {"top": 4}, {}),
    "film, top 4, checkpointed": ("film", {"top": 4}, CHECKPOINTED),
    "full, checkpointed": ("full", {}, CHECKPOINTED),
    # four positions made of the pooled feature, in place of 49 patches
    "linear_map, pooled": ("linear_map", {"prefix": PrefixSpec(tokens="pooled", length=4, layer_norm=False)}, {}),
    # what RGN chose on mini; the row selective_k has the last three groups
    "selective_k, first": ("selective_k", {"criterion": "explicit", "groups": ["embed", "blocks.0", "blocks.1"]}, {}),
    "selective_k, k 0": ("selective_k", {"k": 0}, {}),
    "magma, frozen encoder": ("magma", {"encoder_lr": 0.0}, {}),
    "magma_moe, frozen encoder": ("magma_moe", {"encoder_lr": 0.0}, {}),
}
CACHED = tuple(
    f"{name}, cached"
    for name in (
        "lit",
        "selective_k, k 0",
        "linear_map",
        "linear_map, pooled",
        "cross_modal_reprogramming",
        "magma, frozen encoder",
        "magma_moe, frozen encoder",
    )
)
CACHED_BAR = 0.01  # of the time of a step without the cache
BARS = {"lst": 0.18, "film, top 4": 0.25, "bottleneck, top 4": 0.25, "film, top 4, checkpointed": 0.25}
QUICK = ("full", PEER, "lora", "lst", "film", "film, top 4", "bottleneck", "bottleneck, top 4", "lit", CACHED[0])


class PeakMemory:
    """The most held between `start` and `stop`, above what is held at `start`, in MiB."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Forget what was held before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident size so far
            self._before = self._status("VmRSS")

    def stop(self) -> float:
        """Return the most held since `start`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - self._before) / 2**20
        return (self._status("VmHWM") - self._before) / 2**20

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def settings_for(name: str, encoder: str) -> dict[str, Any]:
    """The benchmark's encoder, and the contrastive branch alone where there is a choice."""
    parameters = inspect.signature(approach_class(name).__init__).parameters
    width, depth, heads = ENCODERS[encoder]
    architecture = f"vit(img_size={SIZE},patch_size=16,embed_dim={width},depth={depth},num_heads={heads})"
    settings: dict[str, Any] = {"encoder": VisionSpec(architecture=architecture, pretrained=False)}
    objective = parameters.get("objective")
    if objective is not None and hasattr(objective.default, "reconstruction_weight"):
        settings["objective"] = replace(objective.default, reconstruction_weight=0.0)
    if "probe_pictures" in parameters:
        settings["probe_pictures"] = 50  # of the frozen classifier's head, which is not what is timed
    if "prefix" in parameters:
        settings["prefix"] = PrefixSpec(pool=2)  # 49 positions: 196 and a caption are more than the mini model has
    if "train_decoder" in parameters:
        settings["train_decoder"] = False  # it would not be used
    return settings


def approach_steps(
    name: str, batch: int, device: torch.device, encoder: str
) -> tuple[Callable[[], torch.Tensor], Any, dict]:
    """Return a function that computes the loss, the optimizer, and counts of parameters."""
    row = name.removesuffix(", cached")
    base, more, options = VARIANTS.get(row, (row, {}, {}))
    settings = settings_for(base, encoder) | more
    settings["encoder"] = replace(settings["encoder"], **options)
    approach = approach_class(base)(**settings)
    approach.setup("fit")
    approach.to(device)
    if hasattr(approach, "prepare"):  # learns from a labelled set of the run's
        data = CaptionDataModule(eval_sets=["mini_shapes", "mini_digits"])
        data.image_spec = approach.image_spec
        approach.prepare(data)
    optimizer = build_optimizer(approach.optimizer_spec, approach.plan.parameter_groups(approach))
    plan = approach.plan.describe(approach)
    images = torch.randn(batch, 3, approach.image_spec.size, approach.image_spec.size, device=device)
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]
    pairs = CaptionBatch(images, captions, [str(i) for i in range(batch)])
    approach.train()
    if name in CACHED:
        with torch.no_grad():
            pairs.encoded = what_is_kept(approach)(images)
        if hasattr(approach, "text"):
            approach.text.remember(captions)
    return lambda: approach.losses(pairs)["loss"], optimizer, plan


def peer_steps(batch: int, device: torch.device, encoder: str) -> tuple[Callable[[], torch.Tensor], Any, dict]:
    """Set up peft's own LoRA on a timm model, as its documentation does, with a contrastive loss on the feature."""
    import peft
    import timm

    size = {"S": "small", "B": "base", "L": "large"}[encoder]
    vit = timm.create_model(f"vit_{size}_patch16_224", pretrained=False, num_classes=0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=r"blocks\..*\.(qkv|proj|fc1|fc2)")
    model = peft.get_peft_model(vit, config).to(device).train()
    head = torch.nn.Linear(vit.num_features, 128, bias=False).to(device)
    trained = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    images = torch.randn(batch, 3, SIZE, SIZE, device=device)
    texts = torch.nn.functional.normalize(torch.randn(batch, 128, device=device), dim=-1)

    def loss() -> torch.Tensor:
        logits = torch.nn.functional.normalize(head(model(images)), dim=-1) @ texts.T / 0.07
        return torch.nn.functional.cross_entropy(logits, torch.arange(batch, device=device))

    counts = {"trained": sum(p.numel() for p in trained), "total": sum(p.numel() for p in model.parameters())}
    return loss, optimizer, counts


def measure(
    name: str, batch: int, steps: int, encoder: str = "S", precision: str = "32", weigh: bool = True
) -> dict[str, Any]:
    """Time one approach in this process, and weigh it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == PEER:
        loss_of, optimizer, counts = peer_steps(batch, device, encoder)
    else:
        loss_of, optimizer, counts = approach_steps(name, batch, device, encoder)
    dtype = PRECISIONS[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    memory, peaks, times = PeakMemory(device), [], []
    steps = max(steps, 10) if name in CACHED else steps  # they are short, and the first few not at their speed
    for _ in range(1 + steps):
        optimizer.zero_grad(set_to_none=True)
        begin = time.process_time() if device.type == "cpu" else time.perf_counter()
        if weigh:
            memory.start()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = loss_of()
        scaler.scale(loss).backward()
        peaks.append(memory.stop() if weigh else 0.0)
        scaler.step(optimizer)
        scaler.update()
        del loss
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.process_time() if device.type == "cpu" else time.perf_counter()) - begin)
    return {
        "name": name,
        "pictures_per_second": batch / min(times[1:]),
        "peak_mib": max(peaks[1:]),
        "trained": counts["trained"],
        "total": counts["total"],
    }


def run_apart(name: str, batch: int, steps: int, encoder: str, precision: str, weigh: bool = True) -> dict[str, Any]:
    """Measure one approach in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"} if weigh else {}
    command = [sys.executable, __file__, "--one", name, "--batch", str(batch), "--steps", str(steps)]
    command += ["--encoder", encoder, "--precision", precision, *([] if weigh else ["--only-time"])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"name": name, "error": (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run_here(name: str, batch: int, steps: int, encoder: str, precision: str, weigh: bool = True) -> dict[str, Any]:
    """Measure one approach in this process."""
    try:
        return measure(name, batch, steps, encoder, precision, weigh)
    except (RuntimeError, ImportError, WlsupError) as error:
        return {"name": name, "error": str(error)[:200]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    """Print the table, or with --json one JSON object; exits with 1 when a bar is missed or an approach fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="the peers and the rows with a bar, one step each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows, beside full")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step (default: 16)")
    parser.add_argument("--steps", type=int, help="timed steps a row (default: 3; 1 with --quick)")
    parser.add_argument("--encoder", choices=ENCODERS, default="S", help="ViT-S/16 (default), B/16 or L/16")
    parser.add_argument("--precision", choices=PRECISIONS, default="32", help="of autocast (default: 32, none)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--only-time", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = options.steps or (1 if options.quick else 3)
    if options.one:
        weigh = not options.only_time
        print(json.dumps(measure(options.one, options.batch, steps, options.encoder, options.precision, weigh)))
        return 0
    every = ["full", PEER, *(name for name in APPROACHES if name != "full"), *VARIANTS, *CACHED]
    asked = options.only or (QUICK if options.quick else every)
    unknown = [name for name in asked if name not in every]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; there are: {', '.join(every)}")
    run = run_here if torch.cuda.is_available() else run_apart
    rows = []
    for name in dict.fromkeys(["full", *asked]):
        rows.append(run(name, options.batch, steps, options.encoder, options.precision))
        print(f"measured {name}", file=sys.stderr, flush=True)
    full = rows[0]
    for row in rows:
        if "error" not in row and "error" not in full:
            row["memory_of_full"] = row["peak_mib"] / full["peak_mib"]
            row["speed_of_full"] = row["pictures_per_second"] / full["pictures_per_second"]
            if row["name"] in BARS:
                row["bar"] = BARS[row["name"]]
                row["met"] = row["memory_of_full"] <= row["bar"]
    by_name = {row["name"]: row for row in rows if "error" not in row}
    for name in CACHED:
        base = name.removesuffix(", cached")
        if name in by_name and base in by_name:
            row = by_name[name]
            apart = [run(one, options.batch, steps, options.encoder, options.precision, False) for one in (name, base)]
            if failed := next((one["error"] for one in apart if "error" in one), None):
                row["error"] = failed
                continue
            row["time_of_uncached"] = apart[1]["pictures_per_second"] / apart[0]["pictures_per_second"]
            row["met"] = row["time_of_uncached"] <= CACHED_BAR
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU, 1 thread"
    report = {"encoder": options.encoder, "precision": options.precision, "batch": options.batch, "steps": steps,
              "torch": torch.__version__, "device": device, "rows": rows}  # fmt: skip
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        what = f"ViT-{options.encoder}/16 at {SIZE}, batch {options.batch}, precision {options.precision}"
        print(f"{what}, torch {torch.__version__}, {device}\n")
        print(f"{'':26} {'pictures/s':>10} {'of full':>8} {'peak MiB':>9} {'of full':>8} {'bar':>6} {'trained':>11}")
        for row in rows:
            if "error" in row or "memory_of_full" not in row:
                print(f"{row['name']:26} failed: {row.get('error', 'full failed, so there is no ratio')}")
                continue
            bar = f"{row['bar']:.2f} {'met' if row['met'] else 'MISSED'}" if "bar" in row else ""
            print(
                f"{row['name']:26} {row['pictures_per_second']:10.1f} {row['speed_of_full']:7.2f}x "
                f"{row['peak_mib']:9.0f} {row['memory_of_full']:7.3f}x {bar:>6} {row['trained']:11,}"
            )
        for row in (by_name[name] for name in CACHED if "time_of_uncached" in by_name.get(name, {})):
            verdict = "met" if row["met"] else "MISSED"
            print(f"\na step of {row['name'].replace(', cached', '')} on cached features takes "
                  f"{row['time_of_uncached']:.4f}x the time of one without; bar {CACHED_BAR}: {verdict}")  # fmt: skip
    return 1 if any("error" in row or row.get("met") is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
