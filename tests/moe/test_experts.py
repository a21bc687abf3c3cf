import copy

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from wlsup.errors import WlsupError
from wlsup.moe import MLPExpert
from wlsup.moe.dispatch import run_batched
from wlsup.moe.experts import parts_of

WIDTH, HIDDEN = 12, 20


def transformers_mlp(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": WIDTH, "n_inner": HIDDEN, "n_layer": 1, "n_head": 2, "vocab_size": 50},
        "gpt_neo": {
            "hidden_size": WIDTH,
            "intermediate_size": HIDDEN,
            "num_layers": 1,
            "attention_types": [[["global"], 1]],
            "num_heads": 2,
            "vocab_size": 50,
        },
        "gptj": {"n_embd": WIDTH, "n_inner": HIDDEN, "n_layer": 1, "n_head": 2, "vocab_size": 50, "rotary_dim": 2},
    }
    other = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    if family == "gpt_neox":
        heads = {"num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes.get(family, {**other, **heads}))
    model = AutoModelForCausalLM.from_config(config).eval()
    return next(module for module in model.modules() if type(module).__name__.endswith("MLP"))


def language_bottleneck():
    from wlsup.adapters.language import LanguageBottleneck

    expert = LanguageBottleneck(WIDTH, HIDDEN)
    nn.init.normal_(expert.up.weight)
    return expert


MADE = {
    "ours": lambda: MLPExpert(WIDTH, HIDDEN),
    "relu without bias": lambda: MLPExpert(WIDTH, HIDDEN, activation="relu", bias=False),
    "timm": lambda: Mlp(WIDTH, HIDDEN),
    "bottleneck": language_bottleneck,
    **{
        f: lambda f=f: transformers_mlp(f) for f in ("gpt2", "gpt_neo", "gptj", "gpt_neox", "llama", "mistral", "qwen2")
    },
}


@pytest.mark.parametrize("name", MADE)
def test_known_mlps_are_computed_together_as_one_by_one(name):
    first = MADE[name]()
    experts = [first, copy.deepcopy(first)]
    for parameter in experts[1].parameters():
        nn.init.normal_(parameter)
    assert all(parts_of(expert) is not None for expert in experts)
    slots = torch.randn(2, 7, WIDTH)
    expected = torch.stack([expert(own) for expert, own in zip(experts, slots, strict=True)])
    torch.testing.assert_close(run_batched(slots, experts), expected, rtol=1e-5, atol=1e-5)


def hooked():
    expert = MLPExpert(WIDTH, HIDDEN)
    expert.up.register_forward_hook(lambda module, inputs, output: 2 * output)
    return expert


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclassed():
    expert = MLPExpert(WIDTH, HIDDEN)
    expert.up = Doubled(WIDTH, HIDDEN)
    return expert


@pytest.mark.parametrize(
    "expert",
    [
        nn.Linear(WIDTH, WIDTH),
        Mlp(WIDTH, HIDDEN, drop=0.1),
        Mlp(WIDTH, HIDDEN, norm_layer=nn.LayerNorm),
        Mlp(WIDTH, HIDDEN, use_conv=True),
        hooked(),
        subclassed(),
    ],
    ids=["no MLP", "dropout", "norm", "convolution", "hook", "another linear"],
)
def test_what_does_more_than_an_mlp_is_not_taken_apart(expert):
    assert parts_of(expert) is None


def test_dropout_is_nothing_at_evaluation():
    assert parts_of(Mlp(WIDTH, HIDDEN, drop=0.1).eval()) is not None


def test_any_module_runs_batched():
    experts = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)]
    slots = torch.randn(3, 5, 4)
    torch.testing.assert_close(run_batched(slots, experts)[2], experts[2](slots[2]))


def test_an_unknown_activation_names_those_there_are():
    with pytest.raises(WlsupError, match=r"Unknown activation 'glue'.*Did you mean 'gelu'"):
        MLPExpert(4, 8, activation="glue")


@pytest.mark.parametrize("name", MADE)
def test_their_stack_brings_each_expert_its_own_gradient_and_a_frozen_one_none(name):
    first = MADE[name]()
    experts = [copy.deepcopy(first) for _ in range(3)]
    for number, expert in enumerate(experts):
        for parameter in expert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        expert.requires_grad_(number != 1)
    slots, gradients = torch.randn(3, 4, WIDTH), []
    for outputs in (
        run_batched(slots, experts),
        torch.stack([expert(own) for expert, own in zip(experts, slots, strict=True)]),
    ):
        outputs.square().sum().backward()
        gradients.append([p.grad for expert in experts for p in expert.parameters()])
        for expert in experts:
            expert.zero_grad()
    for ours, wanted in zip(*gradients, strict=True):
        assert (ours is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    with torch.autocast("cpu", torch.bfloat16):
        run_batched(slots, experts).float().square().sum().backward()
    for parameter, wanted in zip((p for expert in experts for p in expert.parameters()), gradients[1], strict=True):
        if wanted is not None:
            assert parameter.grad.dtype == parameter.dtype
            assert (parameter.grad - wanted).norm() < 0.2 * wanted.norm()  # a relu may change sides


def test_experts_of_different_shapes_are_not_stacked():
    with pytest.raises(WlsupError, match="different shapes"):
        run_batched(torch.randn(2, 4, WIDTH), [MLPExpert(WIDTH, 1), MLPExpert(WIDTH, HIDDEN)])
