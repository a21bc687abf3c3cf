"""Time, memory and exactness of the tiled contrastive losses against open_clip's.

    pip install open_clip_torch
    python benchmarks/contrastive.py [--json] [--batch 4096] [--width 512] [--tile 512] [--pairs 9]

Forward and backward on one thread. Time: the peer and ours in turn, the ratio within each pair, the median over pairs
(and the same of CPU time, which other processes on the machine disturb less).
Memory: peak resident size above the size just before the step, each in a fresh process. Exactness: largest difference
of the gradients from fp64 autograd over the dense logits, relative to the largest entry. Bars, for InfoNCE: time <=
0.60, memory <= 0.20, gradients <= 1e-5. For information: InfoNCE at the largest scale CLIP allows, where logits are too
large to be exponentiated as they are, and SigLIP, whose peer needs three matrix products, as ours does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from wlsup.objectives.contrastive import (
    CLIP_LOGIT_SCALE,
    LOGIT_SCALE_MAX,
    SIGLIP_LOGIT_BIAS,
    SIGLIP_LOGIT_SCALE,
    info_nce,
    siglip,
)

BARS = {"time_ratio": 0.60, "memory_ratio": 0.20, "gradient_error": 1e-5}
CASES = {
    "infonce": (CLIP_LOGIT_SCALE,),
    "infonce_scale_100": (LOGIT_SCALE_MAX,),
    "siglip": (SIGLIP_LOGIT_SCALE, SIGLIP_LOGIT_BIAS),
}


def make_inputs(batch: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors of weakly matching pairs."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, width, generator=generator)
    text = 0.3 * image + torch.randn(batch, width, generator=generator)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def ours(loss: str, tile: int) -> Callable[..., Tensor]:
    """Loss of (image, text, logit_scale[, logit_bias])."""
    return lambda *x: info_nce(*x, tile=tile) if loss != "siglip" else siglip(*x, tile=tile)


def peer(loss: str) -> Callable[..., Tensor]:
    """The same from open_clip, which takes the scale's exponential."""
    from open_clip.loss import ClipLoss, SigLipLoss

    module = ClipLoss() if loss != "siglip" else SigLipLoss()
    return lambda image, text, scale, *bias: module(image, text, scale.exp(), *bias)


def dense(loss: str) -> Callable[..., Tensor]:
    """The definition, for the reference in fp64."""

    def infonce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale.exp() * image @ text.t()
        labels = torch.arange(len(image))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2

    def sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
        return -F.logsigmoid(signs * (scale.exp() * image @ text.t() + bias)).sum() / len(image)

    return infonce if loss != "siglip" else sigmoid


def step(function: Callable[..., Tensor], loss: str, image: Tensor, text: Tensor) -> list[Tensor]:
    """One forward and backward; returns the gradients."""
    scalars = [torch.tensor(v, dtype=image.dtype) for v in CASES[loss]]
    leaves = [x.detach().requires_grad_() for x in (image, text, *scalars)]
    function(*leaves).backward()
    return [x.grad for x in leaves]


def measure_memory(loss: str, who: str, args: argparse.Namespace) -> float:
    """Peak MiB above start, in a fresh process."""
    command = [sys.executable, __file__, "--probe", who, "--loss", loss, "--batch", str(args.batch)]
    command += ["--width", str(args.width), "--tile", str(args.tile)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)


def probe(args: argparse.Namespace) -> None:
    """Print the peak of one step, in MiB; what the libraries allocate once is allocated before, on a small batch."""
    function = ours(args.loss, args.tile) if args.probe == "ours" else peer(args.loss)
    step(function, args.loss, *make_inputs(64, args.width))
    image, text = make_inputs(args.batch, args.width)
    with open("/proc/self/statm") as statm:
        start = int(statm.read().split()[1]) * resource.getpagesize()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # forgets the peak so far; where that is not allowed, the peak is still the step's if larger
    step(function, args.loss, image, text)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print((peak - start) / 2**20)


def measure(loss: str, args: argparse.Namespace) -> dict:
    """All numbers of one loss."""
    image, text = make_inputs(args.batch, args.width)
    pair = {"peer": peer(loss), "ours": ours(loss, args.tile)}
    wall: dict[str, list[float]] = {"peer": [], "ours": []}
    cpu: dict[str, list[float]] = {"peer": [], "ours": []}
    for function in pair.values():
        step(function, loss, image, text)
    for _ in range(args.pairs):
        for who, function in pair.items():
            began, busy = time.perf_counter(), time.process_time()
            step(function, loss, image, text)
            wall[who].append(time.perf_counter() - began)
            cpu[who].append(time.process_time() - busy)
    memory = {who: measure_memory(loss, who, args) for who in pair}
    exact = step(dense(loss), loss, image.double(), text.double())
    error = {
        who: max(
            float((g.double() - e).abs().max() / e.abs().max())
            for g, e in zip(step(f, loss, image, text), exact, strict=True)
        )
        for who, f in pair.items()
    }
    return {
        "time_ratio": statistics.median(o / p for o, p in zip(wall["ours"], wall["peer"], strict=True)),
        "cpu_time_ratio": statistics.median(o / p for o, p in zip(cpu["ours"], cpu["peer"], strict=True)),
        "seconds": {who: statistics.median(s) for who, s in wall.items()},
        "memory_ratio": memory["ours"] / memory["peer"],
        "peak_mib": memory,
        "gradient_error": error["ours"],
        "gradient_error_peer": error["peer"],
    }


def main() -> int:
    """Print the numbers; exit with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs; the median is reported")
    parser.add_argument("--loss", choices=tuple(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--probe", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.probe:
        probe(args)
        return 0
    try:
        import open_clip
    except ImportError:
        print("The peer is missing: pip install open_clip_torch", file=sys.stderr)
        return 2
    result = {
        "benchmark": "contrastive",
        "batch": args.batch,
        "width": args.width,
        "tile": args.tile,
        "pairs": args.pairs,
        "peer": f"open_clip_torch {open_clip.__version__}",
        "torch": torch.__version__,
        "bars": BARS,
        **{loss: measure(loss, args) for loss in CASES},
    }
    result["met"] = all(result["infonce"][name] <= bar for name, bar in BARS.items())
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"B={args.batch}, D={args.width}, tile {args.tile}, one thread, peer {result['peer']}")
        for loss in CASES:
            row = result[loss]
            print(
                f"{loss:18} time {row['time_ratio']:.2f}x (CPU time {row['cpu_time_ratio']:.2f}x)   memory "
                f"{row['memory_ratio']:.2f}x ({row['peak_mib']['ours']:.0f} of {row['peak_mib']['peer']:.0f} MiB)   "
                f"gradient error {row['gradient_error']:.1e} (peer {row['gradient_error_peer']:.1e})"
            )
        print("bars, InfoNCE: time <= 0.60x, memory <= 0.20x, gradients <= 1e-5:", "met" if result["met"] else "MISSED")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
