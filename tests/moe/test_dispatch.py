import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wlsup.errors import WlsupError
from wlsup.moe import MLPExpert, MoE, MoESpec
from wlsup.moe.dispatch import Assignment, choose_path, dispatch, within_capacity

T, D, H, E = 48, 16, 24, 8
GROUPED = pytest.param(
    "grouped", marks=pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has it from 2.10 on")
)
PATHS = ("sort", GROUPED, "batched", "loop")


def experts_of(number=E, dtype=torch.float32):
    torch.manual_seed(3)
    return nn.ModuleList(MLPExpert(D, H) for _ in range(number)).to(dtype)


def assignment(routing, k=1, dropped=False):
    """T tokens, k different experts each: equally many on each expert, or nearly all on one and none on the last."""
    generator = torch.Generator().manual_seed(0)
    if routing == "balanced":
        expert = (torch.arange(T)[:, None] + torch.arange(k)) % E
    else:
        odds = torch.tensor([100.0, 8, 4, 2, 1, 1, 1, 0])
        expert = torch.multinomial(odds.expand(T, -1), k, generator=generator)
    if dropped:
        expert = expert.masked_fill(torch.rand(T, k, generator=generator) < 0.3, E)
    weight = torch.rand(T * k, generator=generator, requires_grad=True)
    return Assignment(torch.arange(T).repeat_interleave(k), expert.flatten(), weight)


def masked_reference(x, given, experts):
    """Every expert on all tokens, times 0 where it was not chosen."""
    total = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        weight = torch.zeros(len(x)).index_add(0, given.token, given.weight * (given.expert == number))
        total = total + weight[:, None] * expert(x)
    return total


def results(function, x, given, experts):
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    given.weight.grad = None
    experts.zero_grad()
    output = function(x, given, experts)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {"output": output, "x": x.grad, "weight": given.weight.grad} | {
        name: parameter.grad for name, parameter in experts.named_parameters()
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("routing", ["balanced", "skewed"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])
def test_every_path_gives_the_masked_references_output_and_gradients(path, routing, k, dropped):
    x, experts, given = torch.randn(T, D), experts_of(), assignment(routing, k, dropped)
    expected = results(masked_reference, x, given, experts)
    found = results(lambda *a: dispatch(*a, path=path), x, given, experts)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1e-6)
        assert (found[name] - value).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("path", PATHS)
def test_an_expert_without_tokens_has_a_gradient_of_zeros(path):
    x, experts, given = torch.randn(T, D), experts_of(), assignment("skewed")
    assert not (given.expert == E - 1).any()
    found = results(lambda *a: dispatch(*a, path=path), x, given, experts)
    assert all(not found[name].any() for name in found if name.startswith(f"{E - 1}."))


@pytest.mark.parametrize("path", PATHS)
def test_tokens_without_an_expert_give_zeros_and_their_contents_reach_nothing(path):
    x, experts, given = torch.randn(T, D), experts_of(), assignment("balanced", dropped=True)
    without = given.expert == E
    before = results(lambda *a: dispatch(*a, path=path), x, given, experts)
    x[without] = 1e3
    after = results(lambda *a: dispatch(*a, path=path), x, given, experts)
    assert not after["output"][without].any()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["sort", "batched", "loop"])
def test_experts_may_be_any_module(path):
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)) for _ in range(E))
    x, given = torch.randn(T, D), assignment("skewed", 2)
    torch.testing.assert_close(
        dispatch(x, given, experts, path), masked_reference(x, given, experts), rtol=1e-5, atol=1e-5
    )


def test_grouped_refuses_experts_that_are_no_mlps():
    with pytest.raises(WlsupError, match="experts that are MLPs"):
        dispatch(torch.randn(T, D), assignment("balanced"), [nn.Linear(D, D) for _ in range(E)], "grouped")


@pytest.mark.parametrize("path", PATHS)
def test_paths_agree_under_autocast(path):
    x, experts, given = torch.randn(T, D), experts_of(), assignment("skewed", 2)
    expected = dispatch(x, given, experts, "sort")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dispatch(x, given, experts, path)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_auto_sorts_on_the_cpu():
    assert choose_path(experts_of(), torch.randn(2, D), "auto", bounded=True) == "sort"
    assert choose_path(experts_of(), torch.randn(2, D), "loop", bounded=True) == "loop"


@pytest.mark.parametrize(
    ("capability", "dtype", "mlps", "bounded", "path"),
    [
        ((9, 0), torch.bfloat16, True, False, "grouped"),
        ((8, 0), torch.bfloat16, True, True, "grouped"),
        ((8, 0), torch.float32, True, False, "sort"),
        ((8, 0), torch.float32, True, True, "batched"),
        ((8, 0), torch.bfloat16, False, False, "sort"),
        ((7, 0), torch.bfloat16, True, False, "sort"),
        ((7, 0), torch.float16, True, True, "batched"),
    ],
)
def test_auto_takes_what_a_gpu_has(monkeypatch, capability, dtype, mlps, bounded, path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)  # whatever this torch has
    x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    experts = experts_of() if mlps else [nn.Linear(D, D)]
    assert choose_path(experts, x, "auto", bounded) == path


def test_auto_leaves_grouped_to_widths_that_it_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    taken = {hidden: choose_path([MLPExpert(D, hidden)] * 2, x, "auto", bounded=False) for hidden in (8, 10, 24, 36)}
    assert taken == {8: "grouped", 10: "sort", 24: "grouped", 36: "sort"}
    assert choose_path([MLPExpert(10, 8)] * 2, x, "auto", bounded=False) == "sort"


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has it from 2.10 on")
@pytest.mark.parametrize(("hidden", "fits"), [(24, True), (10, False), (36, False)])
def test_grouped_says_which_widths_it_does_not_take(hidden, fits):
    experts = nn.ModuleList(MLPExpert(D, hidden) for _ in range(E)).bfloat16()
    x, who = torch.randn(T, D, dtype=torch.bfloat16), assignment("balanced")
    if fits:
        dispatch(x, who, experts, "grouped").sum().backward()
        return
    with pytest.raises(WlsupError, match=f"multiples of 8 in bfloat16, and these map 16 channels to {hidden}"):
        dispatch(x, who, experts, "grouped")


class CountingTensor:
    """Counts how often a path waits for the device's numbers."""

    def __init__(self, monkeypatch):
        self.waits = 0
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__setitem__",
                     "__getitem__", "cpu", "numpy"):  # fmt: skip
            self._count(monkeypatch, name)
        for name in ("nonzero", "argwhere", "masked_select", "unique", "bincount"):
            monkeypatch.setattr(torch, name, self._counted(getattr(torch, name)))

    def _counted(self, function):
        def counted(*args, **kwargs):
            self.waits += 1
            return function(*args, **kwargs)

        return counted

    def _count(self, monkeypatch, name):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            parts = args[0] if args and isinstance(args[0], tuple) else args
            by_mask = any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)
            self.waits += name != "__getitem__" or by_mask  # how many rows a mask takes only the device knows
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)


@pytest.mark.parametrize(
    ("path", "capacity", "most"),
    [
        ("sort", None, 1),
        pytest.param("grouped", None, 0, marks=GROUPED.marks),
        ("batched", None, 1),
        ("batched", 1.0, 0),
    ],
)
@pytest.mark.parametrize("router", ["top_k", "expert_choice", "hash"])
def test_a_layer_waits_for_the_device_once_at_most_whatever_the_number_of_experts(
    monkeypatch, path, capacity, most, router
):
    spec = MoESpec(experts=E, router=router, k=2, dispatch=path, capacity_factor=capacity)
    layer = MoE(experts_of(), D, spec, vocabulary=50)
    x, ids, mask = torch.randn(2, 24, D), torch.randint(50, (2, 24)), torch.ones(2, 24, dtype=torch.bool)
    with monkeypatch.context() as patch:
        counter = CountingTensor(patch)
        layer(x, ids, mask)
    assert counter.waits <= most


def test_whole_layers_agree_over_all_paths_and_routers():
    x = torch.randn(3, 16, D)
    ids, mask = torch.randint(50, (3, 16)), torch.ones(3, 16, dtype=torch.bool)
    mask[1, 9:] = False
    for router, capacity in itertools.product(("top_k", "noisy_top_k", "expert_choice", "hash"), (None, 1.0)):
        found = []
        for path in ("sort", "batched", "loop", *(["grouped"] if hasattr(F, "grouped_mm") else [])):
            torch.manual_seed(1)
            spec = MoESpec(experts=E, router=router, k=2, capacity_factor=capacity, dispatch=path)
            layer = MoE([MLPExpert(D, H) for _ in range(E)], D, spec, vocabulary=50)
            output = layer(x, ids, mask)
            (output.sum() + sum(layer.auxiliary_losses().values())).backward()
            found.append([output, *(parameter.grad for parameter in layer.parameters())])
        for others in found[:-1]:
            for one, reference in zip(others, found[-1], strict=True):
                torch.testing.assert_close(one, reference, rtol=1e-5, atol=1e-5)


def counted_capacity(expert, slots, by_position):
    """The definition: one choice after another."""
    batch, length, k = expert.shape
    kept = torch.zeros_like(expert, dtype=torch.bool)
    order = list(itertools.product(range(length), range(k)))
    if not by_position:
        order.sort(key=lambda at: at[1])
    for b in range(batch):
        taken = [0] * E
        for position, choice in order:
            e = int(expert[b, position, choice])
            if e < E and taken[e] < slots[b]:
                kept[b, position, choice] = True
                taken[e] += 1
    return kept


@pytest.mark.parametrize("by_position", [True, False])
def test_capacity_is_filled_in_order_sample_by_sample(by_position):
    generator = torch.Generator().manual_seed(0)
    expert = torch.rand(3, 20, E, generator=generator).mul(torch.linspace(1, 3, E)).topk(2).indices
    expert[1, 15:] = E
    slots = torch.tensor([3, 5, 100])
    kept = within_capacity(expert, E, slots, by_position)
    assert torch.equal(kept, counted_capacity(expert, slots, by_position))
    assert kept[2].all()
