"""2 processes x half of the samples against one process x all. All cases run in one set of processes."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wlsup.draws import shared
from wlsup.moe import MLPExpert, MoE, MoESpec, auxiliary_losses, update_biases

pytestmark = pytest.mark.multiprocess

WORLD, TIMEOUT = 2, 120  # seconds for the processes
B, L, D, H, E, V = 6, 10, 16, 24, 4, 40

CASES = {
    "top_k": {"router": "top_k", "k": 2},
    "one choice": {"router": "top_k", "k": 1, "combine": "raw"},
    "capacity": {"router": "top_k", "k": 2, "capacity_factor": 1.0},
    "noisy": {"router": "noisy_top_k", "k": 2},
    "noise of one size": {"router": "noisy_top_k", "noise": "fixed"},
    "bias": {"router": "top_k", "balance": "bias", "bias_rate": 0.05},
    "expert_choice": {"router": "expert_choice", "k": 2},
    "soft": {"router": "soft"},
    "soft without jitter": {"router": "soft", "jitter": 0.0},
    "hash": {"router": "hash", "jitter": 0.0},
}


class Model(nn.Module):
    """Two layers one on another, so that the second one's losses reach the first one's weights."""

    def __init__(self, options):
        super().__init__()
        torch.manual_seed(0)
        spec = MoESpec(experts=E, **{"jitter": 0.3, "balance_weight": 1.0, "z_weight": 0.1, "init_std": 0.3} | options)
        self.layers = nn.ModuleList(
            MoE([MLPExpert(D, H) for _ in range(E)], D, spec, vocabulary=V, number=number) for number in range(2)
        )

    def forward(self, x, ids, mask):
        for layer in self.layers:
            x = x + layer(x, ids, mask)
        return x


def inputs():
    """Samples of very different lengths, on the two ranks and on each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, L, D, generator=generator)
    # Rank 0's ids all go to one expert or two: the others have nothing to do there.
    ids = torch.randint(V, (B, L), generator=generator)
    ids[::WORLD] = 3
    mask = torch.arange(L) < torch.tensor([10, 2, 9, 1, 10, 5])[:, None]
    return x, ids, mask


def step(model, batch):
    """Everything of a step that must not depend on the number of processes."""
    with shared(5):
        output = model(*batch)
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    losses = auxiliary_losses(plain)
    (output.square().mean() + sum(losses.values())).backward()
    update_biases(plain)
    found = {f"gradient of {name}": parameter.grad for name, parameter in plain.named_parameters()}
    found |= {name: value.detach() for name, value in losses.items()}
    for number, layer in enumerate(plain.layers):
        routing = layer.routing
        found[f"load {number}"], found[f"probability {number}"] = routing.load, routing.probability
        found[f"dropped {number}"], found[f"entropy {number}"] = routing.dropped, routing.entropy
        if layer.spec.balance == "bias":
            found[f"bias {number}"] = layer.router.bias
    return found


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    batch = [part[rank::world] for part in inputs()]  # as the sampler deals them
    results = {}
    for name, options in CASES.items():
        results[name] = step(DistributedDataParallel(Model(options)), batch)
    # At evaluation ranks may have different numbers of batches: nobody may wait for the others.
    model = Model(CASES["top_k"]).eval()
    if rank == 0:
        model(*batch)
        with torch.no_grad():
            model.train()(*batch)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory, in_processes):
    folder = tmp_path_factory.mktemp("ranks")
    in_processes(work, WORLD, folder, TIMEOUT)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_one_processs_gradients_losses_bias_and_telemetry(results, case):
    expected = step(Model(CASES[case]), inputs())
    for rank in results:
        assert rank[case].keys() == expected.keys()
        for name, value in expected.items():
            worst = (rank[case][name] - value).abs().max() / value.abs().max().clamp_min(1e-6)
            assert worst <= 1e-5, f"{name}: {worst:.1e}"


def test_the_batch_is_one_on_which_ranks_differ():
    """A balance loss of each rank's own would pass unnoticed if it were the same."""
    x, ids, mask = inputs()
    model = Model(CASES["top_k"])
    values = []
    for rows in (slice(0, None, 2), slice(1, None, 2), slice(None)):
        with shared(5):
            model(x[rows], ids[rows], mask[rows])
        values.append(auxiliary_losses(model)["balance"].item())
    assert abs((values[0] + values[1]) / 2 - values[2]) > 1e-3
