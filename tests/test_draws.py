"""What is drawn does not depend on how many processes there are; what one evaluates alone waits for no other."""

import itertools

import pytest
import torch
import torch.distributed as dist
from scipy import stats

from wlsup.callbacks.undisturbed import undisturbed
from wlsup.draws import per_sample, per_token, shared
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


def of_tokens(batch=3, length=5, channels=7, layer=0, what="jitter", seed=1):
    with shared(seed):
        return per_token(torch.empty(batch, length, channels), layer, what)


def test_a_token_draws_the_same_whatever_lies_beside_it(two_processes, monkeypatch):
    with alone():
        whole = of_tokens(6, 9)
    rank0 = of_tokens(3, 9)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    rank1 = of_tokens(3, 4)  # whose captions are shorter
    assert torch.equal(rank0, whole[0::2])
    assert torch.equal(rank1, whole[1::2, :4])


def test_seeds_layers_and_purposes_draw_apart_and_no_state_is_read_or_moved():
    torch.manual_seed(0)
    first, state = of_tokens(), torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(of_tokens(), first)
    torch.set_rng_state(state)
    for other in (of_tokens(seed=2), of_tokens(layer=1), of_tokens(what="noise")):
        assert (other == first).sum() <= 1
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_shared_stream_the_global_state_draws():
    torch.manual_seed(0)
    drawn = per_token(torch.empty(2, 3, 4), 0, "jitter")
    assert not torch.equal(drawn, per_token(torch.empty(2, 3, 4), 0, "jitter"))
    torch.manual_seed(0)
    assert torch.equal(drawn, per_token(torch.empty(2, 3, 4), 0, "jitter"))


def test_neither_0_nor_1_is_drawn_of_which_noise_would_be_infinite(monkeypatch):
    for end in (0, 2**23 - 1):
        monkeypatch.setattr(torch, "randint", lambda high, size, end=end, **_: torch.full(size, end, dtype=torch.int32))
        drawn = per_token(torch.empty(1, 1, 1), 0, "noise")
        assert 0 < drawn.item() < 1
        assert torch.special.erfinv(2 * drawn - 1).isfinite()


def test_the_draws_are_uniform_and_those_beside_each_other_independent():
    drawn = of_tokens(40, 50, 60)
    assert 0 < drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    for axis in range(3):  # the means over the other two axes scatter as means of as many draws do
        means = drawn.movedim(axis, 0).flatten(1).mean(1)
        assert stats.kstest((means - 0.5) / (12 * drawn[0].numel() * 40 / len(means)) ** -0.5, "norm").pvalue > 1e-3
    numbers = drawn.numel()
    beside = [drawn.roll(1, axis) for axis in range(3)]
    beside += [of_tokens(40, 50, 60, layer=1), of_tokens(40, 50, 60, seed=2)]
    for other in beside:
        correlation = torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 4 / numbers**0.5
    bits = (drawn.double() * 2**23).long()
    assert torch.equal((bits + 0.5) / 2**23, drawn.double())
    for low, high in itertools.pairwise((0, 8, 16, 23)):  # part by part
        counts = torch.bincount((bits >> low & (1 << high - low) - 1).flatten(), minlength=1 << high - low)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_what_a_cpu_draws():
    with shared(1):
        assert torch.equal(per_token(torch.empty(3, 5, 7, device="cuda"), 0, "jitter").cpu(), of_tokens())
