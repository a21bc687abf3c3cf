"""What routing costs: a top-1 mixture of experts against the dense MLP of equal active FLOPs.

Run:  python benchmarks/moe_dispatch.py [--json]

One thread, fp32, 4,096 tokens, D = 768, H = 3,072; a step is forward, the balance and the z-loss, and backward, to the
inputs too. Each pair times the dense MLP and right after it the candidate, in CPU time of the process, which a busy
machine disturbs less than the clock on the wall; a row is the median over the pairs of candidate / dense. Routing is
balanced (every expert gets the same number of tokens) or skewed (expert r gets a share that falls as 1 / r). Memory is
the peak of one step above the state before it, in a fresh process, with the gradients of all E experts that it makes.

Peers: transformers' Mixtral block, whose gated MLPs have three products, with H = 2,048 (equal FLOPs), in both of its
implementations; a loop over boolean masks, parameters of their own; and every expert on all tokens, masked (E = 8 only:
one step is E dense steps).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wlsup.moe import MLPExpert, MoE, MoESpec

Step = Callable[[], None]

TOKENS, WIDTH, HIDDEN = 4096, 768, 3072
BARS = {8: 1.15, 16: 1.20, 32: 1.45}
MEMORY_BAR = 1.35
ROUTINGS = ("balanced", "skewed")
PEERS = ("Mixtral, eager", "Mixtral, grouped_mm", "loop over masks", "all tokens, masked")


def directions(experts: int) -> Tensor:
    """(E, D) orthonormal: the router's rows."""
    return torch.linalg.qr(torch.randn(WIDTH, experts, generator=torch.Generator().manual_seed(1)))[0].T.contiguous()


def make_tokens(experts: int, routing: str) -> Tensor:
    """(1, T, D) tokens whose logits for `directions` are 2 for the expert meant and 0 for the others."""
    generator = torch.Generator().manual_seed(0)
    share = torch.ones(experts) if routing == "balanced" else 1 / torch.arange(1, experts + 1)
    ends = (share.cumsum(0) / share.sum() * TOKENS).round().long()
    meant = torch.bucketize(torch.arange(TOKENS), ends, right=True).clamp_max(experts - 1)
    meant = meant[torch.randperm(TOKENS, generator=generator)]
    rows, x = directions(experts), torch.randn(TOKENS, WIDTH, generator=generator)
    return (x - (x @ rows.T) @ rows + 2 * rows[meant])[None]


class MaskLoop(nn.Module):
    """The loop that most codebases begin with."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(MLPExpert(WIDTH, HIDDEN) for _ in range(experts))
        self.router = nn.Linear(WIDTH, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        tokens = x.flatten(0, 1)
        weight, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            out[mine] = expert(tokens[mine]) * weight[mine, None]
        return out.view(x.shape)


class AllMasked(MaskLoop):
    """Every expert on all tokens: the definition, written out."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        weight, chosen = self.router(x).softmax(-1).max(-1)
        return sum(expert(x) * (weight * (chosen == number))[..., None] for number, expert in enumerate(self.experts))


def build(who: str, experts: int) -> tuple[nn.Module, Callable[[], Tensor | float]]:
    """A layer, and its auxiliary losses of the last forward pass."""
    torch.manual_seed(0)
    if who == "dense":
        return MLPExpert(WIDTH, HIDDEN), lambda: 0.0
    if who == "ours":
        layer = MoE([MLPExpert(WIDTH, HIDDEN) for _ in range(experts)], WIDTH, MoESpec(experts=experts))
        router, auxiliary = layer.router, lambda: sum(layer.auxiliary_losses().values())
    elif who.startswith("Mixtral"):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN * 2 // 3,
            num_local_experts=experts,
            num_experts_per_tok=1,
        )
        config._experts_implementation = who.split(", ")[1]
        layer = MixtralSparseMoeBlock(config)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
        router, auxiliary = layer.gate, lambda: 0.0
    else:
        layer = (MaskLoop if who == "loop over masks" else AllMasked)(experts)
        router, auxiliary = layer.router, lambda: 0.0
    router.weight.data.copy_(directions(experts))
    return layer.train(), auxiliary


def make_step(who: str, experts: int, routing: str) -> tuple[Step, Step]:
    """Forward, losses, backward; and what frees the gradients."""
    layer, auxiliary = build(who, experts)
    tokens = make_tokens(experts, routing).requires_grad_()

    def free() -> None:
        layer.zero_grad()
        tokens.grad = None

    def step() -> None:
        free()
        (layer(tokens).square().mean() + auxiliary()).backward()

    return step, free


def seconds(step: Step) -> float:
    """Time one call, in CPU time."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def compare(who: str, experts: int, routing: str, pairs: int) -> dict:
    """Interleave dense and candidate."""
    (dense, _), (candidate, _) = make_step("dense", experts, routing), make_step(who, experts, routing)
    for step in (dense, candidate):
        step()
    times = [(seconds(dense), seconds(candidate)) for _ in range(pairs)]
    row = {
        "who": who,
        "experts": experts,
        "routing": routing,
        "ratio": statistics.median(after / before for before, after in times),
        "dense_ms": 1e3 * statistics.median(before for before, _ in times),
        "ms": 1e3 * statistics.median(after for _, after in times),
        "bar": BARS[experts] if who == "ours" else None,
    }
    print(f"{who}, E = {experts}, {routing}: {row['ratio']:.3f}x", file=sys.stderr, flush=True)
    return row


def measure_memory(who: str, experts: int, routing: str) -> float:
    """Peak MiB of one step, in a fresh process."""
    command = [sys.executable, __file__, "--probe", who, "--experts", str(experts), "--routing", routing]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what was freed before has been given back
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=environment)
    return float(done.stdout)


def probe(who: str, experts: int, routing: str) -> None:
    """Print the peak of the second step: what libraries allocate once is there then."""
    step, free = make_step(who, experts, routing)
    step()
    free()
    with open("/proc/self/statm") as statm:
        start = int(statm.read().split()[1]) * resource.getpagesize()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # forgets the peak so far; where that is not allowed, the peak is still the step's if larger
    step()
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print((peak - start) / 2**20)


def gradient_error(experts: int, routing: str) -> float:
    """Largest difference, over largest value, of our output and gradients to the masked definition's."""
    spec = MoESpec(experts=experts, combine="raw", jitter=0, balance="none", z_weight=0)
    torch.manual_seed(0)
    ours = MoE([MLPExpert(WIDTH, HIDDEN) for _ in range(experts)], WIDTH, spec)
    ours.router.weight.data.copy_(directions(experts))
    reference = AllMasked(experts)
    reference.load_state_dict(ours.state_dict())
    tokens = make_tokens(experts, routing)[:, ::8]
    results = []
    for layer in (ours, reference):
        x = tokens.clone().requires_grad_()
        output = layer(x)
        output.square().mean().backward()
        results.append([output, x.grad, *(parameter.grad for _, parameter in sorted(layer.named_parameters()))])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))


def main() -> int:
    """Print the numbers; exit with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs of a row of ours (default: 7)")
    parser.add_argument("--peer-pairs", type=int, default=2, help="interleaved pairs of a row of a peer (default: 2)")
    parser.add_argument("--ours-only", action="store_true", help="leave the peers out")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("--experts", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--routing", choices=ROUTINGS, default="balanced", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.probe:
        probe(options.probe, options.experts, options.routing)
        return 0

    rows = [compare("ours", e, routing, options.pairs) for e in BARS for routing in ROUTINGS]
    for who in () if options.ours_only else PEERS:
        for experts in BARS if who != "all tokens, masked" else (8,):
            rows += [compare(who, experts, routing, options.peer_pairs) for routing in ROUTINGS]
    dense = measure_memory("dense", 8, "balanced")
    memory = [
        {"who": who, "routing": routing, "mib": mib, "ratio": mib / dense}
        for who in ("ours", *(() if options.ours_only else PEERS))
        for routing in ROUTINGS
        for mib in [measure_memory(who, 8, routing)]
    ]
    errors = {routing: gradient_error(8, routing) for routing in ROUTINGS}
    met = {
        **{f"time, E = {r['experts']}, {r['routing']}": r["ratio"] <= r["bar"] for r in rows if r["bar"]},
        **{f"memory, E = 8, {m['routing']}": m["ratio"] <= MEMORY_BAR for m in memory if m["who"] == "ours"},
        **{f"gradients, E = 8, {routing}": error <= 1e-5 for routing, error in errors.items()},
    }
    report = {
        "benchmark": "moe_dispatch",
        "tokens": TOKENS,
        "width": WIDTH,
        "hidden": HIDDEN,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "pairs": options.pairs,
        "rows": rows,
        "dense_mib": dense,
        "memory": memory,
        "gradient_error": errors,
        "met": met,
    }
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0 if all(met.values()) else 1


def table(report: dict) -> str:
    """The same for reading."""
    lines = [
        f"{TOKENS} tokens, D={WIDTH}, H={HIDDEN}, top-1, forward + backward, 1 thread, fp32, torch {report['torch']}, "
        f"transformers {report['transformers']}, {report['pairs']} pairs",
        "",
        f"{'':22} {'E':>3} {'routing':10} {'dense':>9} {'this':>9} {'ratio':>8} {'bar':>6}",
    ]
    for row in report["rows"]:
        bar = f"{row['bar']:5.2f}x {'met' if row['ratio'] <= row['bar'] else 'MISSED'}" if row["bar"] else ""
        lines.append(
            f"{row['who']:22} {row['experts']:3} {row['routing']:10} {row['dense_ms']:6.0f} ms {row['ms']:6.0f} ms "
            f"{row['ratio']:7.3f}x {bar}"
        )
    lines += ["", f"peak memory of a step at E = 8 (dense: {report['dense_mib']:.0f} MiB)"]
    for row in report["memory"]:
        bar = f"{MEMORY_BAR:5.2f}x {'met' if row['ratio'] <= MEMORY_BAR else 'MISSED'}" if row["who"] == "ours" else ""
        lines.append(f"{row['who']:22}     {row['routing']:10} {row['mib']:16.0f} MiB {row['ratio']:7.3f}x {bar}")
    for routing, error in report["gradient_error"].items():
        verdict = "met" if error <= 1e-5 else "MISSED"
        lines.append(f"output and gradients against the masked definition, {routing}: {error:.1e} (bar 1e-5) {verdict}")
    lines.append("all bars met" if all(report["met"].values()) else "a bar was MISSED")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
