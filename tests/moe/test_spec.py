import pytest

from wlsup.errors import WlsupError
from wlsup.moe import MoESpec

ROUTERS = ("top_k", "noisy_top_k", "expert_choice", "soft", "hash")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"router": "topk"}, "Did you mean 'top_k'"),
        ({"combine": "normalised"}, "Unknown moe.combine"),
        ({"dispatch": "fast"}, "Unknown moe.dispatch"),
        ({"balance": "both"}, "Unknown moe.balance"),
        ({"noise": "none"}, "Unknown moe.noise"),
        ({"hash": "even"}, "Unknown moe.hash"),
        ({"router_dtype": "half"}, "Unknown moe.router_dtype"),
        ({"experts": 0}, "experts >= 1"),
        ({"k": 9}, "k between 1 and experts"),
        ({"slots": 0}, "slots >= 1"),
        ({"balance_weight": -1.0}, "balance_weight"),
        ({"jitter": 1.0}, "jitter in"),
        ({"init_std": 0.0}, "every token goes to expert 0"),
        ({"capacity_factor": 0.0}, "capacity_factor must be above 0"),
        ({"router": "soft", "capacity_factor": 1.0}, "moe.slots"),
        ({"router": "soft", "k": 2}, "moe.slots"),
        ({"router": "hash", "balance": "bias"}, "nothing to balance"),
        ({"router": "expert_choice", "balance": "bias"}, "nothing to balance"),
    ],
)
def test_a_wrong_value_is_one_clear_error(options, says):
    with pytest.raises(WlsupError, match=says):
        MoESpec(**options)


OTHER = {  # of each option a value that is not the default, and the routers that read it
    "combine": ("raw", {"top_k", "noisy_top_k", "expert_choice"}),
    "bias_rate": (0.1, {"top_k", "noisy_top_k"}),
    "jitter": (0.1, {"top_k", "noisy_top_k", "expert_choice", "soft"}),
    "router_dtype": ("model", {"top_k", "noisy_top_k", "expert_choice", "soft"}),
    "noise": ("fixed", {"noisy_top_k"}),
    "hash": ("balanced", {"hash"}),
    "hash_seed": (1, {"hash"}),
    "slots": (2, {"soft"}),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("option", OTHER)
def test_an_option_that_the_router_does_not_read_is_refused(option, router):
    value, readers = OTHER[option]
    if router in readers:
        with_it = {"balance": "bias"} if option == "bias_rate" else {}
        assert getattr(MoESpec(router=router, **with_it, **{option: value}), option) == value
    else:
        with pytest.raises(WlsupError, match=f"moe.{option}: {value} .* {router} does not read it: leave moe.{option}"):
            MoESpec(router=router, **{option: value})


@pytest.mark.parametrize("balance", ["loss", "none"])
def test_the_biases_rate_without_biases_is_refused(balance):
    with pytest.raises(WlsupError, match="moe.bias_rate is of moe.balance: bias"):
        MoESpec(balance=balance, bias_rate=0.1)


@pytest.mark.parametrize("router", ROUTERS)
def test_what_holds_of_every_router_may_be_said_of_every_router(router):
    MoESpec(router=router, combine="renormalized", jitter=0, balance="none")
    MoESpec(router=router, balance_weight=0.1, z_weight=0.1, init_std=0.3)


@pytest.mark.parametrize(("router", "why"), [("expert_choice", "push an earlier one out"), ("soft", "mixtures of")])
def test_routers_that_are_not_causal_are_refused_in_a_causal_model_with_the_reason(router, why):
    with pytest.raises(WlsupError, match=f"{router} is not causal.*{why}.*leak.*Use top_k, noisy_top_k or hash"):
        MoESpec(router=router).check_causal()


@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "hash"])
def test_causal_routers_are_admitted(router):
    MoESpec(router=router, capacity_factor=1.0, k=2).check_causal()
