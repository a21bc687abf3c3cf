"""Sums over processes; what several of them do is tested where they are used."""

import pytest
import torch

from wlsup.ranks import alone, mean_over_ranks, processes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mean_counts_exactly_in_any_precision(dtype):
    total = torch.tensor(514.0 if dtype is not torch.bfloat16 else 512.0, dtype=dtype, requires_grad=True)
    mean = mean_over_ranks(total, torch.tensor(257))  # bfloat16 has 256 and 258
    assert mean.dtype == dtype
    assert torch.equal(mean, (total.double() / 257).to(dtype))
    mean.backward()
    assert torch.equal(total.grad, torch.tensor(1 / 257, dtype=dtype))


def test_of_nothing_the_mean_is_nothing():
    assert mean_over_ranks(torch.tensor(0.0), torch.tensor(0)) == 0


def test_one_process_is_alone_anyhow():
    assert processes() == (1, 0)
    with alone():
        assert processes() == (1, 0)
