"""What one process evaluates alone waits for no other."""

import pytest
import torch
import torch.distributed as dist

from wlsup.callbacks.undisturbed import undisturbed
from wlsup.draws import per_sample, shared
from wlsup.objectives.distributed import meet
from wlsup.ranks import alone, global_sum, mean_over_ranks, processes


@pytest.fixture
def two_processes(monkeypatch):
    """As if this were one of two: any collective fails the test, where it would wait."""

    def waits(*_, **__):
        raise RuntimeError("this would wait for the other process")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "all_reduce", waits)
    monkeypatch.setattr(dist, "all_gather", waits)


def everything():
    rows = torch.ones(3)
    return (
        mean_over_ranks(rows.sum(), torch.tensor(3)),
        global_sum(rows).sum(),
        torch.tensor(meet(rows)[0].total),
        torch.tensor(len(per_sample(lambda n, generator: torch.rand(n, generator=generator), 3))),
    )


def test_alone_nothing_is_summed_over_the_processes(two_processes):
    assert processes() == (2, 0)
    with alone(), shared(1):
        assert processes() == (1, 0)
        assert [float(x) for x in everything()] == [1.0, 3.0, 3.0, 3.0]
    with pytest.raises(RuntimeError, match="would wait"):
        everything()


def test_captions_are_evaluated_alone(two_processes):
    with undisturbed(torch.nn.Linear(1, 1)):
        assert processes() == (1, 0)
    assert processes() == (2, 0)
