import copy
import io
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from wlsup.errors import WlsupError
from wlsup.moe import MLPExpert, MoE, MoESpec, Routing, TokenIds, auxiliary_losses, layer, update_biases

B, L, D, H, E, V = 3, 12, 16, 24, 4, 60
ROUTERS = ("top_k", "noisy_top_k", "expert_choice", "soft", "hash")
CAUSAL = ("top_k", "noisy_top_k", "hash")


def make(causal=False, identical=False, seed=0, **options):
    torch.manual_seed(seed)
    if options.get("router") == "soft":
        options.pop("k", None)
    experts = [MLPExpert(D, H) for _ in range(E)]
    if identical:
        experts = [copy.deepcopy(experts[0]) for _ in range(E)]
    return MoE(experts, D, MoESpec(experts=E, **options), causal, vocabulary=V)


@pytest.fixture
def x():
    return torch.randn(B, L, D)


@pytest.fixture
def ids():
    return torch.randint(V, (B, L))


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# What keeps the function, and what gives the router a gradient


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("combine", ["straight_through", "renormalized"])
@pytest.mark.parametrize("capacity", ["dropless", "room for all"])
@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "hash"])
@pytest.mark.parametrize("training", [True, False])
def test_identical_experts_are_the_dense_mlp(x, ids, k, combine, capacity, router, training):
    factor = None if capacity == "dropless" else E / k
    moe = make(identical=True, k=k, combine=combine, router=router, capacity_factor=factor).train(training)
    assert relative(moe(x, ids), moe.experts[0](x)) <= 1e-6


@pytest.mark.parametrize("combine", ["straight_through", "renormalized"])
def test_identical_experts_that_choose_are_the_dense_mlp_where_they_have_room_for_all(x, combine):
    moe = make(identical=True, router="expert_choice", k=E, combine=combine)
    assert relative(moe(x), moe.experts[0](x)) <= 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"combine": "raw"},
        {"combine": "raw", "k": 2},
        {"router": "soft"},
        {"router": "expert_choice", "k": 1},
        {"capacity_factor": 0.5},
    ],
    ids=["raw", "raw of 2", "soft", "expert choice", "capacity"],
)
def test_where_the_function_is_not_kept_it_is_far_off(x, options):
    moe = make(identical=True, **options)
    assert relative(moe(x), moe.experts[0](x)) > 0.05


def router_gradient(x, **options):
    moe = make(identical=True, balance="none", z_weight=0.0, **options)
    moe(x).square().sum().backward()
    return float(moe.router.weight.grad.norm())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_with_identical_experts_renormalized_gives_the_router_no_gradient_and_straight_through_does(x, k):
    straight = router_gradient(x, k=k, combine="straight_through")
    assert straight > 0.1
    assert router_gradient(x, k=k, combine="renormalized") <= 1e-5 * straight


def test_renormalized_of_one_expert_never_gives_the_router_a_gradient(x):
    moe = make(combine="renormalized", k=1, balance="none", z_weight=0.0)  # experts that differ
    moe(x).square().sum().backward()
    assert not moe.router.weight.grad.any()


# Causality


@pytest.mark.parametrize("router", CAUSAL)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("capacity", [None, 1.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dispatch", ["sort", "batched"])
def test_changing_a_token_changes_no_output_before_it(x, ids, router, k, capacity, training, dispatch):
    options = {"balance": "bias"} if router != "hash" else {}
    moe = make(True, router=router, k=k, capacity_factor=capacity, dispatch=dispatch, **options).double()
    moe.train(training)
    x, moved = x.double(), 0
    for t in range(1, L):
        changed, other = x.clone(), ids.clone()
        changed[:, t] = 5 * torch.randn(B, D)
        other[:, t] = torch.randint(V, (B,))
        outputs = []
        for tokens, names in ((x, ids), (changed, other)):
            torch.manual_seed(7)  # jitter and noise are the same
            outputs.append(moe(tokens, names))
        before, after = outputs
        # Other rows in a product round otherwise; what leaks is larger by ten orders of magnitude.
        assert (before[:, :t] - after[:, :t]).abs().max() < 1e-12
        moved += not torch.equal(before[:, t:], after[:, t:])
    assert moved, "the test changed nothing"


def test_filling_first_choices_first_would_not_be_causal(x):
    """Why the order differs in a causal model: the same layer, filled as elsewhere, lets a later token act back."""
    leaks = 0.0
    moe = make(False, router="top_k", k=2, capacity_factor=0.5, jitter=0.0).double()
    for t in range(1, L):
        changed = x.double()
        before = moe(changed)
        changed[:, t] = 5 * torch.randn(B, D)
        leaks = max(leaks, (before[:, :t] - moe(changed)[:, :t]).abs().max().item())
    assert leaks > 1e-3


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_routers_that_are_not_causal_are_refused(router):
    with pytest.raises(WlsupError, match="not causal.*leak"):
        make(True, router=router)


# Padding


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_padding_gives_zeros_and_takes_part_in_nothing(x, ids, router, capacity):
    factor = None if router == "soft" else capacity
    moe = make(router=router, k=2, capacity_factor=factor, jitter=0.0).eval()
    mask = torch.arange(L) < torch.tensor([L, 7, 2])[:, None]
    found, first = moe(x, ids, mask), moe.routing
    losses = moe.auxiliary_losses()
    assert not found[~mask].any()
    x[~mask] = float("nan")
    again = moe(x, ids, mask.float())
    torch.testing.assert_close(again, found)
    for name, value in moe.auxiliary_losses().items():
        torch.testing.assert_close(value, losses[name])
    torch.testing.assert_close(moe.routing.load, first.load)
    # Nor does it matter how much there is of it.
    alone = moe(x[1:2, :7], ids[1:2, :7])
    torch.testing.assert_close(alone, found[1:2, :7])


@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_but_padding_is_no_nan(x, ids, router):
    moe = make(router=router)
    output = moe(x, ids, torch.zeros(B, L))
    (output.sum() + sum(moe.auxiliary_losses().values())).backward()
    assert not output.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())
    assert all(value == value for value in moe.routing.scalars().values())


@pytest.mark.parametrize("router", ROUTERS)
def test_no_token_at_all_is_no_error(router):
    moe = make(router=router)
    assert moe(torch.empty(0, L, D), torch.empty(0, L, dtype=torch.int64)).shape == (0, L, D)


def test_ids_and_mask_are_found_where_the_model_holds_them(x, ids):
    moe = make(router="hash")
    held = moe.token_ids = TokenIds(V)
    mask = torch.arange(L) < torch.tensor([L, 7, 2])[:, None]
    with held.holding(ids, mask):
        found = moe(x)
    assert torch.equal(found, moe(x, ids, mask))


# Losses and telemetry


def test_losses_are_weighted_and_of_the_last_pass(x):
    moe = make(balance_weight=0.5, z_weight=0.25, jitter=0.0)
    moe(x)
    logits = x @ moe.router.weight.T
    p = logits.softmax(-1).mean((0, 1))
    f = torch.bincount(logits.argmax(-1).flatten(), minlength=E) / (B * L)
    losses = moe.auxiliary_losses()
    torch.testing.assert_close(losses["balance"], 0.5 * E * (f * p).sum())
    torch.testing.assert_close(losses["router_z"], 0.25 * logits.logsumexp(-1).square().mean())
    moe(2 * x)
    assert not torch.equal(moe.auxiliary_losses()["balance"], losses["balance"])


def test_balance_is_1_where_the_choices_fall_evenly_by_indifferent_probabilities():
    moe = make(balance_weight=1.0, init_std=1e-6, jitter=0.0)
    directions = torch.linalg.qr(torch.randn(D, E))[0].T
    moe.router.weight.data.copy_(1e-6 * directions)
    moe(directions.repeat(6, 1)[None])
    assert moe.auxiliary_losses()["balance"].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"balance", "router_z"}),
        ({"router": "noisy_top_k"}, {"balance", "router_z"}),
        ({"z_weight": 0.0}, {"balance"}),
        ({"balance": "bias"}, {"router_z"}),
        ({"balance": "none", "z_weight": 0.0}, set()),
        ({"router": "expert_choice"}, {"router_z"}),
        ({"router": "soft"}, set()),
        ({"router": "hash"}, set()),
    ],
)
def test_there_are_the_losses_that_the_spec_asks_for(x, ids, options, names):
    moe = make(**options)
    assert moe.auxiliary_losses() == {}
    moe(x, ids)
    assert set(moe.auxiliary_losses()) == names


def test_losses_of_a_models_layers_add_up(x):
    model = nn.Sequential(make(), nn.Linear(D, D), make(seed=1))
    model(x)
    total = auxiliary_losses(model)
    first, second = model[0].auxiliary_losses(), model[2].auxiliary_losses()
    assert {name: float(value) for name, value in total.items()} == pytest.approx(
        {name: float(first[name] + second[name]) for name in first}
    )
    assert auxiliary_losses(nn.Linear(2, 2)) == {}


def test_the_balance_loss_evens_the_load_out(x):
    x = x + 2 * torch.randn(D)  # tokens that have much in common, as real ones do
    entropies = []
    for balance in ("none", "loss"):
        moe = make(balance=balance, balance_weight=1.0, z_weight=0.0, init_std=0.3)
        optimizer = torch.optim.Adam(moe.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            loss = moe(x).square().mean() + sum(moe.auxiliary_losses().values())
            loss.backward()
            optimizer.step()
        entropies.append(float(moe.routing.load_entropy))
    assert entropies[1] > 0.95 > entropies[0]


def test_the_bias_evens_the_load_out_without_a_loss_and_by_the_sign_of_the_error(x):
    x = x + 2 * torch.randn(D)
    moe = make(balance="bias", bias_rate=0.01, z_weight=0.0, init_std=0.3, jitter=0.0)
    moe(x)
    start, load = float(moe.routing.load_entropy), moe.routing.load
    update_biases(moe)
    torch.testing.assert_close(moe.router.bias, 0.01 * (load.mean() - load).sign())
    for _ in range(200):
        moe(x)
        update_biases(nn.Sequential(moe))
    assert moe.routing.load_entropy > 0.95 > start


def test_the_bias_counts_all_passes_since_the_last_update_and_none_of_evaluation(x):
    moe = make(balance="bias", jitter=0.0)
    moe(x[:1])
    first = moe.routing.load
    moe(x[1:])
    second = moe.routing.load
    moe.eval()
    moe(100 * torch.randn(B, L, D))
    moe.train()
    update_biases(moe)
    load = first / 3 + second * 2 / 3
    torch.testing.assert_close(moe.router.bias, 1e-3 * (0.25 - load).where((load - 0.25).abs() > 1e-6, 0).sign())
    before = moe.router.bias
    update_biases(moe)  # nothing was routed since
    assert torch.equal(moe.router.bias, before)


def test_a_bias_that_nobody_updates_is_told(x, monkeypatch):
    monkeypatch.setattr(layer, "_PATIENCE", 3)
    moe = make(balance="bias")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe(x)
        moe(x)
        update_biases(moe)
        moe(x)
        moe(x)
    with pytest.warns(UserWarning, match="call wlsup.moe.update_biases"):
        moe(x)


def test_routing_tells_what_happened(x):
    moe = make(jitter=0.0, k=2, capacity_factor=0.5)
    moe(x)
    routing = moe.routing
    logits = x @ moe.router.weight.T
    p = logits.softmax(-1)
    assert isinstance(routing, Routing)
    torch.testing.assert_close(routing.probability, p.mean((0, 1)))
    torch.testing.assert_close(routing.entropy, torch.special.entr(p).sum(-1).mean())
    torch.testing.assert_close(routing.load, torch.bincount(p.topk(2).indices.flatten(), minlength=E) / (2 * B * L))
    assert routing.max_logit == logits.abs().max()
    torch.testing.assert_close(routing.z, logits.logsumexp(-1).square().mean())
    # ceil(12 * 2 * 0.5 / 4) = 3 places on each of 4 experts, of 24 choices a sample
    assert 0.5 <= routing.dropped < 1
    assert not any(value.requires_grad for value in vars(routing).values())
    scalars = routing.scalars()
    assert scalars["dropped"] == pytest.approx(float(routing.dropped))
    assert set(scalars) == {
        "entropy",
        "load_entropy",
        "load_max",
        "load_min",
        "dead",
        "dropped",
        "max_logit",
        "z",
    }


def test_routing_counts_dead_experts(x):
    moe = make(jitter=0.0)
    moe.router.weight.data.zero_()
    moe(x)
    assert moe.routing.dead == E - 1
    assert moe.routing.load_entropy == 0


# A module like any other


@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_layer_is_the_same_layer(x, ids, router):
    options = {"balance": "bias"} if router in ("top_k", "noisy_top_k") else {}
    moe = make(router=router, **options)
    for _ in range(3):
        moe(x, ids)
        update_biases(moe)
    buffer = io.BytesIO()
    torch.save(moe.state_dict(), buffer)
    buffer.seek(0)
    other = make(router=router, seed=1, **options)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.eval()(x, ids), moe.eval()(x, ids))


def test_resumed_training_is_the_same_training(x, ids):
    def steps(moe, optimizer, number):
        for _ in range(number):
            optimizer.zero_grad()
            (moe(x).square().mean() + sum(moe.auxiliary_losses().values())).backward()
            optimizer.step()
            update_biases(moe)
        return torch.cat([parameter.detach().flatten() for parameter in moe.parameters()])

    moe = make(balance="bias", router="noisy_top_k", k=2)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.01)
    steps(moe, optimizer, 3)
    state = copy.deepcopy((moe.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    expected = steps(moe, optimizer, 3)
    resumed = make(balance="bias", router="noisy_top_k", k=2, seed=1)
    again = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    resumed.load_state_dict(state[0])
    again.load_state_dict(state[1])
    torch.set_rng_state(state[2])
    assert torch.equal(steps(resumed, again, 3), expected)


def test_experts_are_loaded_one_by_one(x, tmp_path):
    moe, other = make(), make(seed=1)
    for number, expert in enumerate(moe.experts):
        save_file(expert.state_dict(), tmp_path / f"expert-{number}.safetensors")
    names = {f"experts.{number}.{name}" for number in range(E) for name in moe.experts[0].state_dict()}
    assert names | {"router.weight"} == set(moe.state_dict())
    other.experts[2].load_state_dict(load_file(tmp_path / "expert-2.safetensors"))
    rows = torch.randn(5, D)
    assert torch.equal(other.experts[2](rows), moe.experts[2](rows))
    assert not torch.equal(other.experts[1](rows), moe.experts[1](rows))


def test_a_layer_can_be_copied_after_a_pass(x):
    moe = make()
    moe(x)
    twin = copy.deepcopy(moe)
    assert twin.routing is None
    assert twin.auxiliary_losses() == {}
    assert torch.equal(twin.eval()(x), moe.eval()(x))
    assert pickle.loads(pickle.dumps(moe)).spec == moe.spec
    assert moe.auxiliary_losses()


def test_activation_checkpointing_gives_the_same_gradients(x):
    gradients = []
    for through in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        moe = make(balance="bias", k=2)
        torch.manual_seed(3)
        through(moe, x.clone().requires_grad_()).square().sum().backward()
        update_biases(moe)
        gradients.append([moe.router.bias, *(parameter.grad for parameter in moe.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_models_train(x, ids, router, dtype):
    moe = make(router=router)
    with torch.autocast("cpu", dtype=dtype):
        output = moe(x, ids)
    assert output.dtype == dtype
    (output.float().sum() + sum(moe.auxiliary_losses().values())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())
    half = make(router=router).to(dtype)
    assert half(x.to(dtype), ids).dtype == dtype


def test_tokens_without_samples_are_one_sample(x):
    moe = make(capacity_factor=1.0, jitter=0.0)
    torch.testing.assert_close(moe(x[0]), moe(x[:1])[0])


def test_the_defaults_work_alone(x):
    moe = MoE([MLPExpert(D, H) for _ in range(8)], D)
    assert moe(x).shape == x.shape
    assert "top_k, k=1, combine=straight_through" in repr(moe)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: MoE([MLPExpert(D, H)] * 2, D, MoESpec(experts=2)), "share parameters"),
        (lambda: MoE([MLPExpert(D, H)], D, MoESpec(experts=2)), "moe.experts is 2, and 1 experts were given"),
        (lambda: MoE([MLPExpert(D, H), nn.Linear(D, D)], D, MoESpec(experts=2)), "modules of one kind"),
        (lambda: make()(torch.randn(2, 3, D + 1)), r"takes \(B, L, 16\) or \(T, 16\), not \(2, 3, 17\)"),
        (lambda: make()(torch.randn(D)), r"not \(16,\)"),
        (lambda: make()(torch.randn(2, 3, D), mask=torch.ones(2, 4)), r"mask must be \(2, 3\)"),
    ],
)
def test_wrong_input_is_one_clear_error(build, says):
    with pytest.raises(WlsupError, match=says):
        build()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("router", ROUTERS)
def test_on_a_gpu_grouped_never_waits_and_agrees(x, ids, router):
    moe = make(router=router, dispatch="grouped").cuda().bfloat16().eval()
    x, ids, mask = x.cuda().bfloat16(), ids.cuda(), torch.ones(B, L, dtype=torch.bool, device="cuda")
    moe(x, ids, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = moe(x, ids, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loop = make(router=router, dispatch="loop").cuda().bfloat16().eval()
    loop.load_state_dict(moe.state_dict())
    torch.testing.assert_close(found, loop(x, ids, mask), rtol=0.02, atol=0.02)
