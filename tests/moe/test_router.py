import math

import pytest
import torch

from wlsup.moe import MoESpec
from wlsup.moe.router import ExpertChoiceRouter, NoisyTopKRouter, TopKRouter, combine_weights, slots_of

B, L, D, E = 3, 20, 64, 8


@pytest.fixture
def x():
    return torch.randn(B, L, D)


def real(lengths=(L, L, L)):
    return torch.arange(L) < torch.tensor(lengths)[:, None]


def test_combine_weights_are_p_or_p_over_the_sum_of_the_chosen():
    log_p = torch.tensor([0.5, 0.3]).log()
    torch.testing.assert_close(combine_weights(log_p, "raw"), torch.tensor([0.5, 0.3]))
    for combine in ("renormalized", "straight_through"):
        torch.testing.assert_close(combine_weights(log_p, combine), torch.tensor([0.625, 0.375]))


def test_straight_throughs_gradient_is_that_of_log_p_times_the_weight():
    log_p = torch.tensor([0.5, 0.3]).log().requires_grad_()
    combine_weights(log_p, "straight_through").sum().backward()
    torch.testing.assert_close(log_p.grad, torch.tensor([0.625, 0.375]))


def test_straight_through_survives_probabilities_that_underflow():
    log_p = torch.tensor([[-200.0], [-1.0]], requires_grad=True)  # exp(-200) is 0 in float32
    weight = combine_weights(log_p, "straight_through")
    weight.sum().backward()
    assert torch.equal(weight, torch.ones(2, 1))
    assert torch.equal(log_p.grad, torch.ones(2, 1))


@pytest.mark.parametrize("combine", ["raw", "renormalized", "straight_through"])
def test_a_choice_of_none_is_no_nan(combine):
    log_p = torch.randn(2, 3).log_softmax(-1).requires_grad_()
    chosen = torch.tensor([[True, False, True], [False, False, False]])
    weight = combine_weights(log_p, combine, chosen)
    weight[chosen].sum().backward()
    assert weight[chosen].isfinite().all()
    assert log_p.grad.isfinite().all()
    if combine != "raw":
        assert weight[chosen].sum().item() == pytest.approx(1)


def test_top_k_takes_the_most_probable_experts(x):
    router = TopKRouter(D, MoESpec(experts=E, k=2, combine="raw")).eval()
    routed = router(x, real())
    p = (x @ router.weight.T).softmax(-1)
    expected = p.topk(2)
    torch.testing.assert_close(routed.assignment.expert, expected.indices.flatten())
    torch.testing.assert_close(routed.assignment.weight, expected.values.flatten())
    torch.testing.assert_close(routed.chosen, torch.bincount(expected.indices.flatten(), minlength=E))
    assert routed.dropped == 0


def test_equal_logits_send_everything_to_one_expert_and_the_routers_start_does_not(x):
    """The trap that a router of zeros is."""
    router = TopKRouter(D, MoESpec(experts=E)).eval()
    assert (router(x, real()).chosen > 0).all()
    assert router(x, real()).chosen.max() < B * L / 2
    router.weight.data.zero_()
    assert router(x, real()).chosen.max() == B * L


@pytest.mark.parametrize("seed", range(3))
def test_the_routers_start_has_the_specs_deviation(seed):
    torch.manual_seed(seed)
    assert TopKRouter(768, MoESpec(init_std=0.05)).weight.std().item() == pytest.approx(0.05, rel=0.05)


def test_padding_goes_nowhere(x):
    for kind in (TopKRouter, NoisyTopKRouter, ExpertChoiceRouter):
        routed = kind(D, MoESpec(experts=E, k=2))(x, real((L, 5, 1)))
        going = routed.assignment.token[routed.assignment.expert < E]
        assert real((L, 5, 1)).flatten()[going].all(), kind
        assert routed.chosen.sum() == (routed.assignment.expert < E).sum()


def test_slots_are_rounded_up_but_not_by_a_rounding_error():
    spec = MoESpec(experts=8, k=1, capacity_factor=1.25)
    assert [slots_of(n, spec) for n in (1, 8, 32, 33)] == [1, 2, 5, 6]
    assert slots_of(torch.tensor([1, 8, 32, 33]), spec).tolist() == [1, 2, 5, 6]
    fifths = MoESpec(experts=5, k=1, capacity_factor=1.1)  # 50 * (1.1 / 5) is 11.000000000000002
    assert slots_of(50, fifths) == 11
    assert slots_of(torch.tensor([50]), fifths) == 11


@pytest.mark.parametrize("causal", [True, False])
def test_capacity_drops_what_does_not_fit_by_the_samples_real_length(x, causal):
    router = TopKRouter(D, MoESpec(experts=E, capacity_factor=1.0), causal).eval()
    routed = router(x[:, :1].expand(-1, L, -1), real((20, 9, 3)))  # equal tokens: all to one expert
    going = routed.assignment.expert.view(B, L) < E
    assert going.sum(1).tolist() == [3, 2, 1]
    assert going[:, 0].all()
    assert routed.dropped == 32 - 6


def test_k_tokens_a_sample_are_never_dropped_at_the_capacity_of_all(x):
    routed = TopKRouter(D, MoESpec(experts=E, k=2, capacity_factor=E / 2))(x, real((20, 9, 3)))
    assert routed.dropped == 0


def test_jitter_acts_in_training_only_and_within_its_bounds(x):
    router = TopKRouter(D, MoESpec(experts=E, jitter=0.1))
    assert not torch.equal(router(x, real()).logits, router(x, real()).logits)
    ratio = router.read(x) / x
    assert 0.9 - 1e-6 <= ratio.min() < 0.91
    assert 1.09 < ratio.max() <= 1.1 + 1e-6
    router.eval()
    assert torch.equal(router(x, real()).logits, router(x, real()).logits)
    still = TopKRouter(D, MoESpec(experts=E, jitter=0.0))
    assert torch.equal(still(x, real()).logits, still(x, real()).logits)


def test_the_router_computes_in_float32_under_autocast_unless_told_not_to(x):
    exact = TopKRouter(D, MoESpec(experts=E, jitter=0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = exact(x.bfloat16(), real()).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.bfloat16().float() @ exact.weight.T)
    coarse = TopKRouter(D, MoESpec(experts=E, jitter=0, router_dtype="model"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert coarse(x.bfloat16(), real()).logits.dtype == torch.bfloat16


def test_a_half_precision_model_has_its_router_computed_in_float32(x):
    router = TopKRouter(D, MoESpec(experts=E, jitter=0)).bfloat16()
    assert router(x.bfloat16(), real()).logits.dtype == torch.float32


def test_noise_is_learned_from_a_deviation_of_ln_2_and_is_not_there_at_evaluation(x):
    router = NoisyTopKRouter(D, MoESpec(experts=E, jitter=0))
    logits = torch.zeros(200, 200, E)
    noise = router.choosing(torch.randn(200, 200, D), logits)
    assert noise.std().item() == pytest.approx(math.log(2), rel=0.02)  # softplus(0)
    router(x, real()).assignment.weight.sum().backward()
    assert router.noise.grad.any()
    router.eval()
    assert router.choosing(x, logits) is logits


def test_fixed_noise_has_deviation_one_over_the_number_of_experts():
    router = NoisyTopKRouter(D, MoESpec(experts=E, router="noisy_top_k", noise="fixed"))
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    noise = router.choosing(torch.zeros(200, 200, D), torch.zeros(200, 200, E))
    assert noise.std().item() == pytest.approx(1 / E, rel=0.02)


def test_the_bias_changes_the_choice_and_not_the_weight(x):
    plain = TopKRouter(D, MoESpec(experts=E, k=2, combine="raw", jitter=0))
    biased = TopKRouter(D, MoESpec(experts=E, k=2, combine="raw", jitter=0, balance="bias", bias_rate=0.5))
    biased.weight.data.copy_(plain.weight)
    biased.bias_steps[3] = 4
    assert plain(x, real()).chosen[3] < B * L
    routed = biased(x, real())
    assert routed.chosen[3] == B * L
    p = (x @ plain.weight.T).softmax(-1).flatten(0, 1)
    expected = p.gather(1, routed.assignment.expert.view(-1, 2)).flatten()
    torch.testing.assert_close(routed.assignment.weight, expected)


def test_the_bias_keeps_its_small_steps_in_half_precision():
    router = TopKRouter(D, MoESpec(experts=E, balance="bias"))
    router.bias_steps += 300
    router.bfloat16()
    router.bias_steps += 1
    assert router.bias[0] == pytest.approx(0.301)


def test_expert_choice_takes_the_most_probable_tokens_of_each_sample(x):
    router = ExpertChoiceRouter(D, MoESpec(experts=E, router="expert_choice", k=2, combine="raw")).eval()
    routed = router(x, real((20, 9, 3)))
    p = (x @ router.weight.T).softmax(-1)
    expert, token = routed.assignment.expert, routed.assignment.token
    for sample, (length, slots) in enumerate(zip((20, 9, 3), (5, 3, 1), strict=True)):
        for e in range(E):
            mine = token[(expert == e) & (token // L == sample)] - sample * L
            assert set(mine.tolist()) == set(p[sample, :length, e].topk(slots).indices.tolist())
    taken = expert < E
    torch.testing.assert_close(routed.assignment.weight[taken], p.flatten(0, 1)[token[taken], expert[taken]])


def test_expert_choice_with_room_for_all_takes_all(x):
    routed = ExpertChoiceRouter(D, MoESpec(experts=E, router="expert_choice", k=E))(x, real((20, 9, 3)))
    assert routed.dropped == 0
    assert torch.equal(routed.chosen, torch.full((E,), 32))


def test_expert_choice_counts_tokens_that_nobody_took(x):
    routed = ExpertChoiceRouter(D, MoESpec(experts=E, router="expert_choice", k=1))(x, real((20, 9, 3)))
    taken = routed.assignment.token[routed.assignment.expert < E].unique()
    assert routed.dropped == 32 - len(taken)
    assert routed.dropped > 0


def test_expert_choice_of_a_picture_does_not_depend_on_those_beside_it(x):
    router = ExpertChoiceRouter(D, MoESpec(experts=E, router="expert_choice", jitter=0)).eval()
    alone, together = router(x[:1], real()[:1]).assignment, router(x, real()).assignment
    own = together.token < L
    assert torch.equal(alone.token, together.token[own])
    torch.testing.assert_close(alone.weight, together.weight[own])
