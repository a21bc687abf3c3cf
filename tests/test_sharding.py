"""--trainer.strategy fsdp: the same run as ddp's, its checkpoints whole, its resumption exact; and what it refuses.

That a step's loss and gradients are one process's is in parity/test_approach_ranks.py.
"""

import copy
import json
import os
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import nn
from torch.distributed.tensor import DTensor

from wlsup.approaches import approach_class
from wlsup.batch import CaptionBatch
from wlsup.checkpoint_file import read_checkpoint
from wlsup.cli import main
from wlsup.cli.sharded_strategy import ShardedStrategy
from wlsup.errors import WlsupError
from wlsup.moe import MoE
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.optim import OptimizerSpec, build_optimizer
from wlsup.sharding import SlicedGradScaler, clip_gradients_, gradient_norm, has_shards, shard

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream(), "record_event"), reason="this torch shares out on GPUs only"
)
WORLD, TIMEOUT = 2, 420

OPTIONS = (
    "--data.pairs 8 --data.validation_pairs 4 --data.eval_sets [] --data.batch_size 4 --trainer.max_epochs 2 "
    "--trainer.accelerator cpu --trainer.devices 2 --captioning.samples 0 --captioning.pictures 0 "
    "--model.encoder_lr 1e-3 --model.lr 1e-2"
)
"""Two steps of two processes."""


def fit(folder, *options, approach="magma_moe"):
    recipes = ["-c", "experiments/base.yaml", "-c", f"experiments/{approach}.yaml"]
    if approach == "linear_map":
        return main(["fit", *recipes, *OPTIONS.split()[:-4], "--run_dir", f"{folder}", *options])
    return main(["fit", *recipes, *OPTIONS.split(), "--run_dir", f"{folder}", *options])


def clipped(rank):
    """Clip gradients of which some are slices; return the norm's and the clipped gradients' errors."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)))
    apart = copy.deepcopy(whole)
    shard([apart[1]], torch.device("cpu"))
    x = 10 * torch.randn(4, 6)
    errors = []
    for algorithm, limit in (("norm", 0.5), ("norm", 1e4), ("value", 0.1)):
        for model in (whole, apart):
            model.zero_grad()
            model(x).square().sum().backward()
        norm = gradient_norm(list(apart.parameters()))
        clip_gradients_(list(apart.parameters()), limit, algorithm)
        if algorithm == "norm":
            true = nn.utils.clip_grad_norm_(whole.parameters(), limit)
            errors.append(float((norm - true).abs() / true))
        else:
            nn.utils.clip_grad_value_(whole.parameters(), limit)
        for mine, theirs in zip(apart.parameters(), whole.parameters(), strict=True):
            errors.append(float((gradient(mine) - theirs.grad).abs().max() / theirs.grad.abs().max()))
    return max(errors)


def unscaled(rank):
    """Unscale gradients of which some are slices; return the largest error, and whether each rank skips alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 8, bias=False)))
    shard([model[1]], torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    scaler = SlicedGradScaler("cpu", init_scale=1024.0)
    x, errors, skipped = torch.randn(4, 6), [], []
    for broken in (False, True):
        optimizer.zero_grad()
        model(x).sum().backward()
        true = [gradient(p).clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(model(x).sum()).backward()
        if broken and rank == 1:  # in a slice that the other rank does not have
            model[1][0].weight.grad.to_local().fill_(float("inf"))
        scaler.unscale_(optimizer)
        if not broken:
            mine = [gradient(p) for p in model.parameters()]
            errors += [float((a - b).abs().max()) for a, b in zip(mine, true, strict=True)]
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(torch.equal(before, model[0].weight))
    return max(errors), skipped


def gradient(parameter):
    return parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad


def work(rank, world, folder):
    torch.set_num_threads(1)
    port = Path(f"{folder}/port").read_text()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
    }  # fmt: skip
    sharded = ("--trainer.strategy", "fsdp")
    codes = [
        fit(f"{folder}/fsdp", *sharded, "--captioning.pictures", "2"),
        fit(f"{folder}/again", *sharded, "--checkpoints.time_limit", "0.001s"),
        fit(f"{folder}/again", *sharded, "--resume", "auto"),
        fit(f"{folder}/mixed", "--trainer.strategy", "ddp", "--checkpoints.time_limit", "0.001s"),
        fit(f"{folder}/mixed", *sharded, "--resume", "auto"),
        # whose measure, behind captions that all processes make, trains a control through the language model
        fit(f"{folder}/linear_map", *sharded, "--captioning.pictures", "2", approach="linear_map"),
        fit(f"{folder}/magma", *sharded, "--wise_ft.enabled", "true", "--data.eval_sets", "[mini_shapes]",
            "--wise_ft.alphas", "[0,1]", "--trainer.max_epochs", "1", approach="magma"),
    ]  # fmt: skip
    torch.save({"codes": codes, "clipping": clipped(rank), "scaling": unscaled(rank)}, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, in_processes):
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    in_processes(work, WORLD, folder, TIMEOUT)
    return folder


def checkpoint(runs, name):
    return read_checkpoint(runs / name / "checkpoints" / "last.ckpt")


def moments(saved):
    return {
        f"{number} {key}": value
        for number, entry in saved["optimizer_states"][0]["state"].items()
        for key, value in entry.items()
    }


@pytest.mark.multiprocess
@pytest.mark.slow
class TestRuns:
    def test_all_end(self, runs):
        for rank in range(WORLD):
            assert torch.load(runs / f"found-{rank}.pt", weights_only=True)["codes"] == [0, 75, 0, 75, 0, 0, 0]

    def test_captions_are_scored_by_all_processes_and_told_by_one(self, runs):
        results = json.loads((runs / "fsdp" / "results.json").read_text())
        assert results["captioning"]["pictures"] == 2 and results["task"]["rows"]

    def test_what_ddp_began_it_ends_and_it_saves_whole_tensors(self, runs):
        mine, theirs = checkpoint(runs, "fsdp"), checkpoint(runs, "mixed")
        assert mine["global_step"] == theirs["global_step"] == 2
        assert mine["state_dict"].keys() == theirs["state_dict"].keys()
        for kind in (lambda saved: saved["state_dict"], moments):
            for name, value in kind(theirs).items():
                assert type(kind(mine)[name]) is torch.Tensor, name
                assert torch.allclose(kind(mine)[name], value, rtol=1e-4, atol=1e-6), name

    def test_broken_off_and_resumed_it_is_the_same_bit_for_bit(self, runs):
        once, twice = checkpoint(runs, "fsdp"), checkpoint(runs, "again")
        assert once["global_step"] == twice["global_step"] == 2
        for kind in (lambda saved: saved["state_dict"], moments):
            for name, value in kind(once).items():
                assert torch.equal(kind(twice)[name], value), name

    def test_in_half_precision_all_ranks_skip_a_step_or_none(self, runs):
        for rank in range(WORLD):
            error, skipped = torch.load(runs / f"found-{rank}.pt", weights_only=True)["scaling"]
            assert error < 1e-5
            assert skipped == [False, True]

    def test_gradients_are_clipped_as_whole_ones_are(self, runs):
        for rank in range(WORLD):
            assert torch.load(runs / f"found-{rank}.pt", weights_only=True)["clipping"] < 1e-6


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    yield
    dist.destroy_process_group()


def strategy_over(approach, scaler=None, callbacks=()):
    strategy = ShardedStrategy(parallel_devices=[torch.device("cpu")], cluster_environment=None)
    strategy._lightning_module = strategy.model = approach
    strategy.precision_plugin = SimpleNamespace(scaler=scaler)
    approach._trainer = SimpleNamespace(callbacks=list(callbacks))
    strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    return strategy


def test_an_approach_without_a_language_model_is_refused(alone):
    film = approach_class("film")()
    with pytest.raises(WlsupError, match="approach 'film' has neither: use ddp"):
        strategy_over(film).model_to_device()


@pytest.mark.parametrize(
    ("options", "more", "named"),
    [
        ({"regularizer": RegularizerSpec(l2sp=0.1)}, {}, "regularizer.l2sp"),
        ({"regularizer": RegularizerSpec(ema=0.9)}, {}, "regularizer.ema"),
        ({"optimizer": OptimizerSpec(name="lars")}, {}, "optimizer.name lars"),
        ({}, {"callbacks": [SimpleNamespace(reads_whole_weights=True)]}, "wise_ft or spectra"),
    ],
)
def test_what_needs_whole_mixtures_is_refused_by_name(options, more, named, alone):
    approach = approach_class("magma_moe")(**options)
    approach.plan.apply(approach)
    with pytest.raises(WlsupError, match=named):
        strategy_over(approach, **more).model_to_device()


def test_with_a_frozen_model_shared_out_all_of_it_works(alone):
    approach = approach_class("magma")(regularizer=RegularizerSpec(l2sp=0.1, ema=0.9))
    approach.plan.apply(approach)
    strategy_over(approach, scaler=object()).model_to_device()
    assert has_shards(approach.language) and not has_shards(approach.adapters)


def test_nothing_stays_gathered_behind_a_forward_pass(alone):
    approach = approach_class("magma_moe")()
    approach.plan.apply(approach)
    strategy_over(approach).model_to_device()
    batch = CaptionBatch(torch.randn(2, 3, 64, 64), ["a red star", "a ring"], ["a", "b"])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            approach.losses(batch)
        assert all(isinstance(p, DTensor) for unit in approach.shardable for p in unit.parameters()), grad
    approach.losses(batch)["loss"].backward()
    assert all(isinstance(p, DTensor) for unit in approach.shardable for p in unit.parameters())
    assert has_shards(approach)


def test_a_spectrum_of_the_language_model_is_refused(alone):
    approach = approach_class("magma")()
    approach.plan.apply(approach)
    spectra = SimpleNamespace(reads_whole_weights=True, layers="language.*")
    with pytest.raises(WlsupError, match=r"language models are shared out, and spectra\.layers"):
        strategy_over(approach, callbacks=[spectra]).model_to_device()


def test_blocks_and_mixtures_are_shared_out_and_nothing_else(alone):
    approach = approach_class("magma_moe")()
    approach.plan.apply(approach)
    strategy = strategy_over(approach, scaler=object())
    strategy.model_to_device()
    assert isinstance(strategy.precision_plugin.scaler, SlicedGradScaler)
    inside = {id(p) for block in approach.language.blocks for p in block.parameters()}
    inside |= {id(p) for m in approach.modules() if isinstance(m, MoE) for p in m.parameters()}
    for name, parameter in approach.named_parameters():
        assert hasattr(parameter, "full_tensor") == (id(parameter) in inside), name


@pytest.mark.parametrize(("algorithm", "most"), [(GradClipAlgorithmType.VALUE, 0.1), (GradClipAlgorithmType.NORM, 0.5)])
def test_lightning_s_names_of_clipping_are_understood(algorithm, most, alone):
    approach = approach_class("magma_moe")()
    approach.plan.apply(approach)
    strategy = strategy_over(approach)
    strategy.model_to_device()
    parameters = [parameter for parameter in approach.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    strategy.precision_plugin.clip_gradients(torch.optim.SGD(parameters, lr=1.0, foreach=False), most, algorithm)
    if algorithm == GradClipAlgorithmType.VALUE:
        assert all(float(gradient(parameter).max()) == pytest.approx(most) for parameter in parameters)
    else:
        assert float(gradient_norm(parameters)) == pytest.approx(most, rel=1e-4)


def test_the_optimizer_works_one_by_one_where_slices_lie_beside_whole_tensors(alone):
    whole, apart = nn.Linear(2, 2), nn.Linear(2, 2)
    shard([apart], torch.device("cpu"))
    groups = [{"params": [*whole.parameters(), *apart.parameters()], "lr": 0.1, "weight_decay": 0.0}]
    for name in ("adamw", "sgd"):
        assert build_optimizer(OptimizerSpec(name=name), groups).defaults["foreach"] is False
    alone_whole = [{"params": list(whole.parameters()), "lr": 0.1, "weight_decay": 0.0}]
    assert build_optimizer(OptimizerSpec(), alone_whole).defaults["foreach"] is None
