"""``wlsup plan-scale``: what a run would take on so many GPUs, by arithmetic calibrated on what was measured.

A step of B pictures a GPU is taken to last as long as the slower of two things that go on side by side: reading B
pictures, and computing on them plus what of the communication does not hide behind the backward pass. docs/scale.md has
the formulas, and says which constants were measured and which are assumed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from wlsup.cli.parser import CommandParser
from wlsup.errors import WlsupError, choose

__all__ = ["Cluster", "Job", "Model", "plan", "run"]

HELP = """\
usage: wlsup plan-scale [APPROACH] [options]

Say what a run would take: memory a GPU, seconds a step by term, efficiency against one GPU. No GPU is needed.

  APPROACH              any of `wlsup approaches`, or film_top_4, bottleneck_top_4: in the top four blocks alone (full)
  --encoder NAME        vit_tiny | vit_small | vit_base | vit_large | vit_huge (vit_base), patches of 16 at 224 px
  --language NAME       none | gpt2 | opt-1.3b | gpt-j-6b | llama-7b: of magma, magma_moe, mae_lm, linear_map (gpt2)
  --experts N, --k N    a mixture of magma_moe's, and how many of them a token takes (4, 2)
  --mixture NAME        what they are: adapters (default) | ffn, copies of every second MLP of the language model
  --shard-experts       plan the experts spread over the GPUs, which wlsup does not do: each keeps them all
  --batch N             pictures a GPU (64)
  --nodes N             (1)
  --gpus-per-node N     (1)
  --gpu NAME            v100 | a100 | h100 (h100)
  --precision P         32 | 16 | bf16 (bf16; a V100 has none: 16)
  --strategy S          ddp | fsdp (ddp): whether the language model and experts are shared out over the GPUs
  --link GB/s           of a node to the others (25: two EDR InfiniBand rails)
  --intra GB/s          of a GPU to the others of its node (150: NVLink)
  --workers N           loader processes a GPU (8)
  --json                machine-readable, complete
"""

# width, depth
ENCODERS = {
    "vit_tiny": (192, 12),
    "vit_small": (384, 12),
    "vit_base": (768, 12),
    "vit_large": (1024, 24),
    "vit_huge": (1280, 32),
}
# width, depth, vocabulary
LANGUAGE = {
    "none": (0, 0, 0),
    "gpt2": (768, 12, 50_257),
    "opt-1.3b": (2048, 24, 50_272),
    "gpt-j-6b": (4096, 28, 50_400),
    "llama-7b": (4096, 32, 32_000),
}
TOKENS = 197
CAPTION = 32
TEXT = (512, 12, 77)
"""CLIP's frozen text encoder: width, depth, tokens."""


@dataclass(frozen=True)
class Approach:
    """What an approach costs against full fine-tuning of the encoder with a contrastive loss.

    Args:
        trained: share of the encoder's parameters that trains, or that as many new ones make up.
        work: FLOPs of a step over those of the encoder's forward pass.
        speed: pictures a second over what those FLOPs say; measured where `MEASURED` says so.
        memory: activations over those of full fine-tuning.
        measured: on a GPU (benchmarks/approaches_gpu.json), not estimated.
        reconstructs: its default objective has a reconstruction branch, which is not planned.
    """

    trained: float
    work: float
    speed: float
    memory: float
    measured: bool = True
    reconstructs: bool = False


APPROACHES = {
    "full": Approach(1.0, 3.0, 1.0, 1.0),
    "mae_cl": Approach(1.3, 3.9, 0.95, 1.1, measured=False),
    "bottleneck": Approach(0.031, 2.0, 0.622, 0.776, reconstructs=True),
    "bottleneck_top_4": Approach(0.011, 1.33, 0.718, 0.266, reconstructs=True),
    "film": Approach(0.03, 2.0, 0.676, 0.881, reconstructs=True),
    "film_top_4": Approach(0.011, 1.33, 0.723, 0.315, reconstructs=True),
    "token_replay": Approach(0.009, 2.0, 0.707, 0.758, reconstructs=True),
    "merged_attention": Approach(0.031, 2.0, 0.658, 0.822, reconstructs=True),
    "co_attention": Approach(0.054, 2.0, 0.616, 0.81, reconstructs=True),
    "asymmetric_attention": Approach(0.042, 2.0, 0.619, 0.784, reconstructs=True),
    "reprogramming": Approach(0.0018, 2.0, 0.304, 0.705),
    "cross_modal_reprogramming": Approach(0.009, 2.0, 1.072, 0.481),
    "lst": Approach(0.03, 1.1, 0.23, 0.154, reconstructs=True),
    "selective_k": Approach(0.168, 1.5, 0.94, 0.205),  # the last three groups
    "lora": Approach(0.015, 2.0, 0.491, 1.063),
    "lit": Approach(0.0014, 1.0, 0.841, 0.059),
    # with the language model of the plan, which was not measured
    "mae_lm": Approach(1.0, 3.0, 1.0, 1.0, measured=False, reconstructs=True),
    "linear_map": Approach(0.0012, 1.0, 0.74, 0.059, measured=False),
    "magma": Approach(1.0, 3.0, 1.0, 1.0, measured=False),
    "magma_moe": Approach(1.0, 3.0, 1.0, 1.0, measured=False),
}
CAPTIONERS = ("mae_lm", "linear_map", "magma", "magma_moe")
PEAK = {
    "v100": {"32": 15.7, "16": 125.0},
    "a100": {"32": 19.5, "16": 312.0, "bf16": 312.0},
    "h100": {"32": 67.0, "16": 989.0, "bf16": 989.0},
}
"""TFLOP/s of dense products, as the makers state them."""
MEMORY = {"v100": 16, "a100": 40, "h100": 80}
"""GB; 32 and 80 are sold too."""
UTILISATION = 0.171
"""Of the peak, by `full` with ViT-B/16 under bf16 on an H100: 1,617 pictures a second. Assumed for the other GPUs."""
ACTIVATION = 39.7
"""Bytes a token, layer and channel under bf16 autocast, by the same run: 4,406 MiB for 64 pictures."""
READ = 179.0
"""Pictures a second that a loader process reads at least: 1,433 by eight of them (480 x 360 JPEGs)."""
MIXTURE = 4.1
"""Time of a mixture of 8 MLPs of width 768 over the dense MLP of as many tokens, forward and backward, on an H100."""
HIDDEN = 0.5
"""Share of the computing behind which gradients travel: the backward pass, but for its end. Assumed."""
LINK_EFFICIENCY = 0.8
"""Of a link's rate, by large messages. Assumed."""
GB = 1e9


@dataclass(frozen=True)
class Model:
    """Sizes.

    Args:
        encoder: parameters of the vision encoder.
        language: of the frozen language model, without experts.
        experts: of all experts, but for the one that a dense model has.
        trained: all that trains, but for the experts.
        trained_experts: all experts.
        flops: of a step, a picture.
        activations: bytes a picture.
        expert_layers: mixtures in the language model.
        width: of the language model.
    """

    encoder: float
    language: float
    experts: float
    trained: float
    trained_experts: float
    flops: float
    activations: float
    expert_layers: int
    width: int


@dataclass(frozen=True)
class Cluster:
    """Nodes, GPUs a node, their kind, and links in GB/s: of a node to the others, of a GPU within its node."""

    nodes: int = 1
    gpus_per_node: int = 1
    gpu: str = "h100"
    link: float = 25.0
    intra: float = 150.0
    workers: int = 8

    @property
    def gpus(self) -> int:
        """In all."""
        return self.nodes * self.gpus_per_node

    @property
    def rate(self) -> float:
        """Bytes a second that each GPU gets through to the others, the slowest link on the way counting."""
        between = self.link / self.gpus_per_node if self.nodes > 1 else self.intra
        return LINK_EFFICIENCY * GB * min(self.intra, between)


@dataclass(frozen=True)
class Job:
    """What runs: names as in the command's help."""

    approach: str = "full"
    encoder: str = "vit_base"
    language: str = "none"
    experts: int = 0
    k: int = 2
    mixture: str = "adapters"
    shard_experts: bool = False
    batch: int = 64
    precision: str = "bf16"
    strategy: str = "ddp"


def transformer(width: int, depth: int, tokens: int) -> tuple[float, float]:
    """Return parameters, without embeddings, and FLOPs of a forward pass over so many tokens."""
    parameters = 12 * depth * width**2
    return parameters, 2 * parameters * tokens + 4 * depth * tokens**2 * width


def size(job: Job) -> Model:
    """Return the sizes of a job's models."""
    approach = APPROACHES[job.approach]
    width, depth = ENCODERS[job.encoder]
    encoder, forward = transformer(width, depth, TOKENS)
    flops, activations = approach.work * forward, approach.memory * ACTIVATION * TOKENS * width * depth
    trained, language, experts, trained_experts, layers = approach.trained * encoder, 0.0, 0.0, 0.0, 0
    wide, deep, vocabulary = LANGUAGE[job.language]
    if wide:
        positions = TOKENS - 1 + CAPTION
        blocks, told = transformer(wide, deep, positions)
        language = blocks + vocabulary * wide
        flops += 2 * (told + 2 * vocabulary * wide * CAPTION)  # frozen: forward, and back to what is in front of it
        activations += ACTIVATION * positions * wide * deep + 12.0 * CAPTION * vocabulary
        adapter, mlp = wide**2 / 2, 8 * wide**2  # at each MLP, factor 4
        if job.approach == "magma":
            trained += deep * adapter
        elif job.experts and job.mixture == "adapters":
            layers = deep  # each of a k-th of the channels, so that a token meets one adapter's worth
            experts = trained_experts = job.experts * layers * adapter / job.k
        elif job.experts:
            layers = deep // 2
            experts, trained_experts = (job.experts - 1) * layers * mlp, job.experts * layers * mlp
            dense = 6 * layers * mlp * positions  # forward, and backward to inputs and weights
            flops += (MIXTURE * job.k - 2 / 3) * dense  # two thirds of one pass are in the frozen model's count
    else:
        text_width, text_depth, text_tokens = TEXT
        flops += transformer(text_width, text_depth, text_tokens)[1]
    return Model(encoder, language, experts, trained, trained_experts, flops, activations, layers, wide)


def plan(job: Job, cluster: Cluster) -> dict[str, Any]:
    """Return memory a GPU in GiB, and milliseconds a step, by term; efficiency is against one such GPU.

    Raises:
        WlsupError: a precision that the GPU has not.
    """
    precision = choose("precision", job.precision, PEAK[cluster.gpu], hint="A V100 has no bf16.")
    model, world = size(job), cluster.gpus
    bytes_each = 4 if precision == "32" else 2
    sharded = world if job.strategy == "fsdp" else 1
    apart = world if job.shard_experts else 1
    text = 0.0 if job.language != "none" else 63.4e6
    frozen_bytes = bytes_each if job.language != "none" else 4  # a large frozen model is loaded in half precision
    words = LANGUAGE[job.language][2] * model.width  # embeddings, which every GPU keeps whole
    large, experts = (model.language - words) * frozen_bytes, model.experts * 4  # what FSDP shares out
    trained = model.trained + model.trained_experts / max(sharded, apart)
    # Under FSDP one unit is whole at a time: a block, or a mixture, and of a mixture its gradients too.
    mixture = model.trained_experts / max(model.expert_layers, 1)
    gathered_unit = max(12 * model.width**2 * frozen_bytes, 4 * mixture) if sharded > 1 else 0.0
    memory = {
        "weights": (model.encoder + text) * 4
        + words * frozen_bytes
        + large / sharded
        + experts / max(sharded, apart)
        + gathered_unit,
        "gradients": 4 * trained + (4 * mixture if sharded > 1 else 0.0),
        "optimizer": 8 * trained,
        "activations": model.activations * job.batch * (2 if precision == "32" else 1),
    }
    speed = APPROACHES[job.approach].speed
    computing = model.flops * job.batch / (1e12 * PEAK[cluster.gpu][precision] * UTILISATION * speed)
    others = (world - 1) / world
    gathered = 2 * others * (large + (experts if apart == 1 else 0)) if sharded > 1 else 0.0  # forward, and backward
    of_experts = 0 if apart > 1 else 1 if sharded > 1 else 2  # each expert's gradients arise where it lies
    reduced = others * 4 * (2 * model.trained + of_experts * model.trained_experts)
    embeddings = 2 * others * world * job.batch * 512 * 4 if job.language == "none" else 0.0
    exchanged = 0.0
    if job.shard_experts and model.expert_layers:
        tokens = job.batch * (TOKENS - 1 + CAPTION)
        exchanged = 4 * others * tokens * model.width * bytes_each * model.expert_layers  # there and back, twice
    seconds = {
        "compute": computing,
        "all-gather": (gathered + embeddings) / cluster.rate,
        "all-reduce": reduced / cluster.rate,
        "all-to-all": exchanged / cluster.rate,
        "data": job.batch / (READ * cluster.workers),
    }
    exposed = max(0.0, seconds["all-reduce"] + seconds["all-gather"] - HIDDEN * computing) + seconds["all-to-all"]
    step = max(computing + exposed, seconds["data"])
    return {
        "job": asdict(job) | {"precision": precision},
        "cluster": asdict(cluster),
        "parameters": {"encoder": model.encoder, "language": model.language, "experts": model.experts,
                       "trained": model.trained + model.trained_experts},
        "memory_gib": {name: value / 2**30 for name, value in memory.items()},
        "memory_of_gpu": sum(memory.values()) / 1e9 / MEMORY[cluster.gpu],
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "step_ms": 1e3 * step,
        "bound_by": "data" if seconds["data"] >= computing + exposed else "links" if exposed > computing else "compute",
        "pictures_per_second": world * job.batch / step,
        "efficiency": max(computing, seconds["data"]) / step,
        "estimated": not APPROACHES[job.approach].measured or cluster.gpu != "h100" or world > 1
        or job.encoder != "vit_base" or precision == "32",
    }  # fmt: skip


def run(arguments: list[str]) -> int:
    """Print the plan."""
    options = _options(arguments)
    if options.nodes < 1 or options.gpus_per_node < 1 or options.batch < 1 or options.workers < 1:
        raise WlsupError("nodes, gpus-per-node, batch and workers must be at least 1.")
    if not (options.link > 0 and options.intra > 0):
        raise WlsupError("link and intra, GB/s, must be more than 0.")
    for asked in ("experts", "k", "mixture", "shard_experts"):
        if options.approach != "magma_moe" and (given := getattr(options, asked)) is not None and given is not False:
            raise WlsupError(f"--{asked.replace('_', '-')} is of magma_moe's experts; {options.approach} has none.")
    if options.language == "none" and options.strategy == "fsdp":
        raise WlsupError(f"--strategy fsdp shares out a language model: plan {', '.join(CAPTIONERS)}.")
    experts = 4 if options.approach == "magma_moe" and options.experts is None else options.experts or 0
    if options.language != "none" and options.approach not in CAPTIONERS:
        raise WlsupError(f"--language is of {', '.join(CAPTIONERS)}; {options.approach} has no language model.")
    if options.approach in CAPTIONERS and options.language == "none":
        raise WlsupError(f"{options.approach} needs a --language model.")
    if options.approach == "magma_moe" and not 1 <= (2 if options.k is None else options.k) <= experts:
        raise WlsupError("magma_moe needs at least one of --experts, and a --k between 1 and them.")
    job = Job(options.approach, options.encoder, options.language, experts, options.k or 2,
              options.mixture or "adapters", options.shard_experts, options.batch, options.precision,
              options.strategy)  # fmt: skip
    cluster = Cluster(options.nodes, options.gpus_per_node, options.gpu, options.link, options.intra, options.workers)
    found = plan(job, cluster)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    gib, share = found["memory_gib"], found["memory_of_gpu"]
    gpus = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}"
    print(f"{job.approach}, {job.encoder}, {job.batch} pictures a GPU, {gpus}")
    parts = ", ".join(f"{name} {value:.1f}" for name, value in gib.items())
    cure = "lower --batch" + (", or --strategy fsdp" if job.strategy == "ddp" and job.language != "none" else "")
    fits = "" if share <= 0.9 else f"; too much for {MEMORY[cluster.gpu]} GB: {cure}"
    print(f"memory a GPU    {sum(gib.values()):.1f} GiB ({parts}){fits}")
    terms = ", ".join(f"{name} {value:.1f}" for name, value in found["milliseconds"].items() if value)
    print(f"a step          {found['step_ms']:.1f} ms, bound by {found['bound_by']} ({terms})")
    print(f"pictures a s    {found['pictures_per_second']:,.0f}, efficiency {100 * found['efficiency']:.0f} %")
    if APPROACHES[job.approach].reconstructs:
        print(
            "of its main branch alone: with the reconstruction that recipes begin with it takes more (film, "
            "PRESET=paper: 27.3 GB and 792 pictures/s where this plans 16 GiB and 1,432; docs/scale.md)"
        )
    if found["estimated"]:
        print("an estimate: links, other GPUs than the H100 and some approaches were not measured (docs/scale.md)")
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser("plan-scale")
    parser.add_argument("approach", nargs="?", default="full", choices=list(APPROACHES))
    parser.add_argument("--encoder", default="vit_base", choices=list(ENCODERS))
    parser.add_argument("--language", choices=list(LANGUAGE))
    parser.add_argument("--experts", type=int)
    parser.add_argument("--k", type=int)
    parser.add_argument("--mixture", choices=["adapters", "ffn"])
    parser.add_argument("--shard-experts", action="store_true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=1)
    parser.add_argument("--gpu", default="h100", choices=list(PEAK))
    parser.add_argument("--precision", choices=["32", "16", "bf16"])
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--link", type=float, default=25.0)
    parser.add_argument("--intra", type=float, default=150.0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    options.language = options.language or ("gpt2" if options.approach in CAPTIONERS else "none")
    options.precision = options.precision or ("16" if options.gpu == "v100" else "bf16")
    return options
