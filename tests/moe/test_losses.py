import math

import pytest
import torch

from wlsup.moe import balance_loss, router_z_loss


@pytest.mark.parametrize("experts", [2, 8, 32])
def test_balance_loss_is_1_where_uniform_and_the_number_of_experts_where_one_has_all(experts):
    uniform = torch.full((experts,), 1 / experts)
    assert balance_loss(uniform, uniform) == pytest.approx(1)
    alone = torch.eye(experts)[0]
    assert balance_loss(alone, alone) == pytest.approx(experts)


def test_balance_loss_has_its_gradient_through_the_probability_only():
    fraction = torch.tensor([0.75, 0.25], requires_grad=True)
    probability = torch.tensor([0.5, 0.5], requires_grad=True)
    balance_loss(fraction, probability).backward()
    assert fraction.grad is None
    assert torch.equal(probability.grad, torch.tensor([1.5, 0.5]))  # E f


@pytest.mark.parametrize("experts", [2, 8])
def test_z_loss_of_zero_logits_is_the_squared_log_of_their_number(experts):
    assert router_z_loss(torch.zeros(5, experts)) == pytest.approx(math.log(experts) ** 2)


def test_z_loss_presses_a_shift_down_that_the_softmax_does_not_see():
    logits = torch.full((3, 4), 10.0, requires_grad=True)
    router_z_loss(logits).backward()
    assert (logits.grad > 0).all()


def test_z_loss_leaves_padding_out():
    logits = torch.randn(6, 4)
    mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool)
    expected = router_z_loss(logits[:4])
    logits[4:] = 1e4
    torch.testing.assert_close(router_z_loss(logits, mask), expected)
    assert router_z_loss(logits, torch.zeros(6, dtype=torch.bool)) == 0
