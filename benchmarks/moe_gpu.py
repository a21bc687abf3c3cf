"""What routing costs on a GPU: a top-1 mixture of experts, path by path, against the dense MLP of equal active FLOPs.

Run:  python benchmarks/moe_gpu.py [--json] [--tokens N]

bfloat16 autocast over fp32 weights, 16,384 tokens, D = 768, H = 3,072; a step is forward, the balance and the z-loss,
and backward, to the inputs too. Each pair times the dense MLP and right after it the candidate, on the wall with the
GPU waited for; a row is the median over the pairs of candidate / dense. Memory is the most allocated in a step above
what was before it (weights, and gradients, which are there from the step before). Also: how often a step makes the CPU
wait for the GPU, and how far the paths are apart in fp32 without TF32, output and gradients.

Peers: transformers' Mixtral block of equal FLOPs in both of its implementations; a loop over boolean masks.
The batched path has a capacity of 1.25, so that with skewed routing it leaves choices out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import moe_dispatch
from moe_dispatch import HIDDEN, ROUTINGS, WIDTH, AllMasked, build, directions, make_tokens

from wlsup.draws import shared
from wlsup.moe import MLPExpert, MoE, MoESpec

EXPERTS = (8, 32, 64)
OURS = ("grouped", "sort", "batched")
PEERS = ("Mixtral, eager", "Mixtral, grouped_mm", "loop over masks")
CAPACITY = 1.25  # of the batched path, which capacity bounds


def ours(experts: int, path: str) -> MoE:
    """A mixture with one way of dispatch; batched with a capacity, as that is what it is for."""
    spec = MoESpec(experts=experts, dispatch=path, capacity_factor=CAPACITY if path == "batched" else None)
    torch.manual_seed(0)
    layer = MoE([MLPExpert(WIDTH, HIDDEN) for _ in range(experts)], WIDTH, spec)
    layer.router.weight.data.copy_(directions(experts))
    return layer.train()


def make_step(who: str, experts: int, routing: str) -> Callable[[], None]:
    """Forward, losses, backward, on the GPU under bfloat16 autocast."""
    if who in OURS:
        layer: nn.Module = ours(experts, who)
        auxiliary = lambda: sum(layer.auxiliary_losses().values())  # noqa: E731
    else:
        layer, auxiliary = build(who, experts)
    layer.cuda()
    tokens = make_tokens(experts, routing).cuda().requires_grad_()

    def step() -> None:
        with shared(0), torch.autocast("cuda", torch.bfloat16):  # draws jitter as a run does
            loss = layer(tokens).float().square().mean() + auxiliary()
        loss.backward()

    return step


def seconds(step: Callable[[], None]) -> float:
    """Time one call on the wall, the GPU waited for."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(who: str, experts: int, routing: str, pairs: int) -> dict[str, Any]:
    """Interleave dense and candidate; count what makes the CPU wait."""
    dense, candidate = make_step("dense", experts, routing), make_step(who, experts, routing)
    for _ in range(3):
        dense()
        candidate()
    times = [(seconds(dense), seconds(candidate)) for _ in range(pairs)]
    peaks = {}
    for name, step in (("dense", dense), (who, candidate)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        candidate()
        torch.cuda.set_sync_debug_mode("default")
    row = {
        "who": who,
        "experts": experts,
        "routing": routing,
        "ratio": statistics.median(after / before for before, after in times),
        "dense_ms": 1e3 * statistics.median(before for before, _ in times),
        "ms": 1e3 * statistics.median(after for _, after in times),
        "dense_mib": peaks["dense"],
        "mib": peaks[who],
        "waits": sum("called a synchronizing" in str(wait.message) for wait in waits),
    }
    print(f"{who}, E = {experts}, {routing}: {row['ratio']:.3f}x", file=sys.stderr, flush=True)
    return row


def paths_apart(routing: str, experts: int = 8) -> dict[str, float]:
    """Largest difference, over largest value, of a path's output and gradients to the masked definition's, in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = make_tokens(experts, routing)[:, ::4].cuda()

    def results(layer: nn.Module) -> list[Tensor]:
        x = tokens.clone().requires_grad_()
        output = layer(x)
        output.square().mean().backward()
        return [output, x.grad, *(parameter.grad for _, parameter in sorted(layer.named_parameters()))]

    apart = {}
    for path in ("sort", "batched", "loop"):
        spec = MoESpec(experts=experts, combine="raw", jitter=0, balance="none", z_weight=0, dispatch=path)
        torch.manual_seed(0)
        layer = MoE([MLPExpert(WIDTH, HIDDEN) for _ in range(experts)], WIDTH, spec).cuda()
        layer.router.weight.data.copy_(directions(experts))
        reference = AllMasked(experts).cuda()
        reference.load_state_dict(layer.state_dict())
        pairs = zip(results(layer), results(reference), strict=True)
        apart[path] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return apart


def main() -> int:
    """Print the numbers; exits with 1 where the paths differ, or the grouped path makes the CPU wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--tokens", type=int, default=16_384, help="a step (default: 16384)")
    parser.add_argument("--pairs", type=int, default=20, help="interleaved pairs of a row (default: 20)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here; benchmarks/moe_dispatch.py is the one for a CPU")
    moe_dispatch.TOKENS = options.tokens
    rows = []
    for who in (*OURS, *PEERS):
        for experts in EXPERTS:
            for routing in ROUTINGS:
                try:
                    rows.append(compare(who, experts, routing, options.pairs))
                except (RuntimeError, ImportError) as error:
                    rows.append({"who": who, "experts": experts, "routing": routing, "error": str(error)[:200]})
                torch.cuda.empty_cache()
    apart = {routing: paths_apart(routing) for routing in ROUTINGS}
    report = {"benchmark": "moe_gpu", "tokens": options.tokens, "torch": torch.__version__,
              "device": torch.cuda.get_device_name(0), "rows": rows, "apart": apart}  # fmt: skip
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{options.tokens} tokens, D={WIDTH}, H={HIDDEN}, top-1, bf16, torch {report['torch']}")
        print(f"{report['device']}\n")
        print(f"{'':22} {'E':>3} {'routing':10} {'dense':>9} {'this':>9} {'ratio':>8} {'memory':>8} {'waits':>6}")
        for row in rows:
            if "error" in row:
                print(f"{row['who']:22} {row['experts']:3} {row['routing']:10} {row['error']}")
                continue
            print(
                f"{row['who']:22} {row['experts']:3} {row['routing']:10} {row['dense_ms']:6.2f} ms {row['ms']:6.2f} ms "
                f"{row['ratio']:7.3f}x {row['mib'] / row['dense_mib']:7.2f}x {row['waits']:6}"
            )
        for routing, errors in apart.items():
            print(f"fp32, {routing}: " + ", ".join(f"{path} {error:.1e}" for path, error in errors.items()))
    wrong = any(error > 1e-5 for errors in apart.values() for error in errors.values())
    waits = any(row.get("waits") for row in rows if row["who"] == "grouped")
    return int(wrong or waits)


if __name__ == "__main__":
    sys.exit(main())
