"""Every approach: 2 processes x batch 16 give the loss and the gradients of one process x batch 32.

All cases run in one set of processes, each over one step's worth of the same pictures, captions and random draws.
"""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from wlsup.approaches import APPROACHES, approach_class
from wlsup.batch import CaptionBatch
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.feature_cache import what_is_kept
from wlsup.draws import share, unshare
from wlsup.models.prefix import PrefixSpec
from wlsup.moe import MoESpec
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec
from wlsup.reprogramming.conditioner import ReprogrammerSpec
from wlsup.sharding import has_shards, leave_alone, shard

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

B, WORLD, TIMEOUT = 32, 2, 420

MOE = {"experts": 4, "k": 2, "jitter": 0.1, "balance_weight": 0.1}
CASES = {name: (name, {}) for name in APPROACHES} | {
    "reprogramming": ("reprogramming", {"probe_pictures": 100}),
    "cross_modal_reprogramming": ("cross_modal_reprogramming", {"probe_pictures": 100, "penalty": 0.1}),
    "film, siglip, masked": ("film", {"objective": ObjectiveSpec(contrastive="siglip", contrastive_view="masked")}),
    "film, in micro-batches": ("film", {"objective": ObjectiveSpec(micro_batch=3)}),
    "full, regularised": ("full", {"regularizer": RegularizerSpec(distill=1.0, l2sp=0.1)}),
    "token_replay, reprogrammed": ("token_replay", {"reprogrammer": ReprogrammerSpec()}),
    "token_replay, warm-up": ("token_replay", {"reprogrammer": ReprogrammerSpec(warmup_batches=1)}),
    "selective_k, rgn": ("selective_k", {"criterion": "rgn", "k": 2}),
    "selective_k, fisher": ("selective_k", {"criterion": "fisher", "k": 2}),
    "magma_moe": ("magma_moe", {"moe": MoESpec(**MOE)}),
    "magma_moe, ffn, hash": (
        "magma_moe",
        {"mixture": "ffn", "moe": MoESpec(experts=4, k=1, router="hash")},
    ),
    "magma_moe, ffn": ("magma_moe", {"mixture": "ffn", "moe": MoESpec(**MOE)}),
    "magma_moe, hash": ("magma_moe", {"moe": MoESpec(experts=4, k=1, router="hash")}),
    "magma_moe, balanced hash": (
        "magma_moe",
        {"moe": MoESpec(experts=4, k=1, router="hash", hash="balanced")},
    ),
    "magma_moe, noisy": ("magma_moe", {"moe": MoESpec(**{**MOE, "router": "noisy_top_k"})}),
    "magma_moe, bias": ("magma_moe", {"moe": MoESpec(**{**MOE, "balance": "bias", "bias_rate": 0.05})}),
}
CACHED = {
    "lit, cached": CASES["lit"],
    "linear_map, cached": ("linear_map", {"prefix": PrefixSpec(pool=2, layer_norm=False)}),
    "magma, cached": ("magma", {"encoder_lr": 0.0}),
    "magma_moe, cached": ("magma_moe", {"encoder_lr": 0.0, "moe": MoESpec(**MOE)}),
}
"""Fed with what the frozen encoder made of the pictures, as `data.cache_features` does."""
CASES |= CACHED
ONCE = MoESpec(experts=4, k=1, combine="renormalized", balance_weight=0.1)
"""Its router learns by what it adds to the loss alone, and so without the mixture's output."""
TO_SHARE = ("mae_lm", "linear_map", "magma", "magma_moe", "magma_moe, ffn")
SHARDED = {f"{case}, shared out": CASES[case] for case in TO_SHARE}
SHARDED |= {"magma_moe, renormalized, shared out": ("magma_moe", {"moe": ONCE})}
CASES |= SHARDED if hasattr(torch.cpu.Stream(), "record_event") else {}  # older: on GPUs only
WORDS = "red blue green square circle star left right above small large sand grass water night brick"
WORDS = WORDS.split(" ")


class Training(nn.Module):
    """What DistributedDataParallel wraps: an approach whose forward pass is its training losses."""

    def __init__(self, approach):
        super().__init__()
        self.approach = approach

    def forward(self, batch):
        return self.approach.training_losses(batch)


def pairs(rank, world):
    """The rows of the global batch that the sampler deals to ``rank``; captions of very different lengths."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(B, 3, 64, 64, generator=generator)
    captions = [" ".join(WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(1 + i * 3 % 8)) for i in range(B)]
    keys = [f"k{i // 2}" for i in range(B)]  # pairs of pictures with one name, apart on different ranks
    own = range(rank, B, world)
    return CaptionBatch(images[own.start :: world], [captions[i] for i in own], [keys[i] for i in own])


def made(name, options, batch):
    torch.manual_seed(0)
    approach = approach_class(name)(**options)
    if getattr(approach, "chosen", True) is None:
        approach.select([batch])
    if hasattr(approach, "count_words"):
        approach.count_words(iter([" ".join(WORDS[: 1 + i % 5]) for i in range(50)]))
    approach.setup("fit")
    if hasattr(approach, "prepare"):
        data = CaptionDataModule(eval_sets=["mini_shapes", "mini_digits"])
        data.image_spec = approach.image_spec
        approach.prepare(data)
    approach.train()
    with torch.no_grad():  # off the identity, where many gradients are zero
        generator = torch.Generator().manual_seed(2)
        for planned in approach.plan.resolve(approach):
            if planned.rule.trains and not planned.name.endswith(("logit_scale", "logit_bias")):
                parameter = planned.parameter
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return approach


def step(case, rank, world):
    name, options = CASES[case]
    batch = pairs(rank, world)
    approach = made(name, options, batch)
    if case in CACHED:
        with torch.no_grad():
            batch = replace(batch, images=torch.empty(len(batch), 0), encoded=what_is_kept(approach)(batch.images))
    whole = Training(approach)
    if world > 1 and case in SHARDED:
        shard(approach.shardable, torch.device("cpu"))
        assert has_shards(approach)
        leave_alone(whole)
    module = DistributedDataParallel(whole) if world > 1 else whole
    share(11)
    torch.manual_seed(11)
    losses = module(batch)
    losses["loss"].backward()
    unshare()
    found = {f"loss {part}": value.detach() for part, value in losses.items()}
    gradients = {n: p.grad for n, p in approach.named_parameters() if p.grad is not None}
    found |= {f"gradient {n}": g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    found |= {f"score {n}": torch.tensor(v) for n, v in getattr(approach, "scores", {}).items()}
    return found


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    for number, case in enumerate(CASES):
        torch.save(step(case, rank, world), f"{folder}/{number}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, in_processes):
    folder = tmp_path_factory.mktemp("ranks")
    in_processes(work, WORLD, folder, TIMEOUT)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_together_give_one_processs_loss_and_gradients(case, folder):
    number = list(CASES).index(case)
    ranks = [torch.load(folder / f"{number}-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    whole = step(case, 0, 1)
    assert any(name.startswith("gradient") for name in whole)
    gradients = [value.norm() for name, value in whole.items() if name.startswith("gradient")]
    least = 0.1 * float(torch.stack(gradients).norm())  # in fp32 a gradient next to nothing has no more digits
    for name, truth in whole.items():
        mean = sum(found[name] for found in ranks) / WORLD
        error = float((mean - truth).norm() / truth.norm().clamp(min=least if name.startswith("gradient") else 1e-4))
        assert error <= 1e-5, f"{name}: {error:.2e}"
        if not name.startswith("loss"):
            assert torch.equal(ranks[0][name], ranks[1][name]), name
